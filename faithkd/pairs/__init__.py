"""Pairs of networks that are files: read without executing anything of theirs, looked over, bounded, handed on."""
