"""The numbers of the recipes by which artefacts are made: part of the inputs of each.

Raise a number when a change to the code alters what comes out, so that nothing made by the older recipe is taken
for new.
tests/test_recipes.py remembers small results and notices the need.
"""

TRAINING = 1  # which weights a training ends with: attacks, losses, models, training
MEASURING = 1  # what is measured of given networks: attacks, evaluation, bounds up to CROWN
SEARCHING = 2  # bounds past CROWN: descents, linear programs, branch and bound
