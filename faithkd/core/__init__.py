"""The paper itself: data, networks, attacks, losses, training, and what is measured."""
