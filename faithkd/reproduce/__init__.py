"""Everything the paper reports, made again: parameters, artefacts, experiments, notebooks and the command line."""
