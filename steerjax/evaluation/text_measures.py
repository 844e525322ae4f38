"""What is measured of a text itself: characters, words, and where textstat can be used its Flesch-Kincaid grade."""

import importlib.metadata
from collections.abc import Callable


def text_measures(text: str, grade: Callable[[str], float] | None) -> dict[str, float | None]:
    """`characters`, `words` and `grade`, the years of school that it asks for; None without a word or a `grade`."""
    worded = grade is not None and any(letter.isalnum() for letter in text)
    return {"characters": len(text), "words": len(text.split()), "grade": float(grade(text)) if worded else None}


def flesch_kincaid() -> tuple[Callable[[str], float] | None, str]:
    """textstat's `flesch_kincaid_grade` and which it is; None and why where it cannot be used.

    0.7.9 and later fetch a dictionary at the first call, and fail without a network.
    """
    cure = "pip install 'steerjax[evaluation]'"
    try:
        import textstat

        textstat.flesch_kincaid_grade("One word.")
        return textstat.flesch_kincaid_grade, f"textstat {importlib.metadata.version('textstat')}"
    except ImportError:
        return None, f"left out: textstat is not there; cure: {cure}"
    except LookupError:
        return None, f"left out: this textstat has no dictionary here; cure: {cure}"
