"""What an error must tell a user: the place, the key, the value and the cure. The words between are free."""

import contextlib
import re

import pytest


def names(text: str, fact: str) -> bool:
    """As whole words: 'rows' is not in 'rows_read'."""
    return not fact or re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text) is not None


def says(error: BaseException | str, *facts: str, cure: str = "") -> None:
    """It names the facts and has a cure, which names `cure`."""
    _, _, cured = str(error).partition("cure: ")
    missing = [fact for fact in facts if not names(str(error), fact)]
    assert cured.strip(), f"no cure: {error}"
    assert not missing, f"{missing} not in: {error}"
    assert names(cured, cure), f"{cure!r} not in the cure: {error}"


@contextlib.contextmanager
def refused(error: type[BaseException] | tuple[type[BaseException], ...], *facts: str, cure: str = ""):
    """The block ends with this error, which says these."""
    with pytest.raises(error) as caught:
        yield
    says(caught.value, *facts, cure=cure)
