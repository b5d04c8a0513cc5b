"""The bounds as they are satisfy every law; `test_mistakes` shows that the laws see what is wrong."""

import laws
import pytest


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law()
