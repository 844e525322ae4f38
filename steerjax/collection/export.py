"""Label Studio's JSON export -> the ratings of each task of a key."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from steerjax.collection.tasks import Key, task_data
from steerjax.data.loading import Skipped
from steerjax.data.readers import iter_rows
from steerjax.errors import DataError
from steerjax.schema import Schema, check_rating

Ratings = dict[str, dict[str, float]]  # rater -> attribute -> rating

_VALUES = {"choices": "choices", "rating": "rating", "number": "number"}  # type of a result -> key of its value
_AS_JSON = "export the project as JSON, not as JSON-MIN, CSV or TSV, which do not say who rated"


@dataclass
class Collected:
    """What exports hold: ratings by the key's task, Label Studio's number of each task, and what was not used."""

    ratings: dict[str, Ratings] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


def read_exports(sources: Sequence[str], key: Key, *, on_bad_row: str = "error") -> Collected:
    """Every rater's ratings. Of two annotations of a task by one rater the later counts.

    Raises DataError, which names file, entry (from 1) and task: no export as JSON, a task that is not the key's or
    shows another text, a rating that is none or out of range, no rater. With `skip` these are listed. Without any
    rating it is an error all the same.
    """
    found, when = Collected(), {}
    for source in sources:
        for line, row in iter_rows(source):
            try:
                if isinstance(row, DataError):
                    raise row
                name, annotations = _task(row, key, found.counts)
                found.numbers.setdefault(name, row.get("id"))
                for rater, time, given in annotations:
                    ratings = found.ratings.setdefault(name, {})
                    found.counts["annotations by a rater who had rated the task before"] += rater in ratings
                    if time >= when.get((name, rater), ""):
                        ratings[rater], when[name, rater] = given, time
            except DataError as error:
                number = row.get("id") if isinstance(row, dict) else None
                message = f"task {number}: {error.message}" if number is not None else error.message
                error = error.but(message=message, file=source, line=line)
                if on_bad_row == "error":
                    cure = f"{error.cure}; or --on-bad-row skip, which lists such tasks and uses the others"
                    raise error.but(cure=cure) from None
                found.skipped.append(Skipped(source, line, error.reason))
    found.counts["tasks without ratings"] = len(key.tasks) - len(found.ratings)
    if not found.ratings:
        said = ", ".join(f"{n} {what}" for what, n in found.counts.items() if n) or "no task"
        first = f"; the first bad one: {found.skipped[0].reason}" if found.skipped else ""
        raise DataError(f"no rating ({said}{first})", file=sources[0], cure="rate first, then export again")
    return found


def _task(row: dict, key: Key, counts: Counter) -> tuple[str, list[tuple[str, str, dict[str, float]]]]:
    """The key's name of an exported task, and (rater, when, ratings) of each annotation that has ratings."""
    if not isinstance(row.get("annotations"), list) or not isinstance(row.get("data"), dict):
        raise DataError("no task with its annotations", field="annotations", cure=_AS_JSON)
    name = row["data"].get("task")
    if name not in key.tasks:
        other = str(name).rpartition("-")[0] if name else "no"
        what = f"'{name}' is not a task of project {key.project}, but of {other} project"
        raise DataError(what, field="data.task", cure="give the key.json that was written with these tasks")
    shown = task_data(name, key.tasks[name])
    if changed := [field for field in ("dialogue", "response") if row["data"].get(field) != shown[field]]:
        cure = "import tasks.json as it was written; ratings of another text are of no use"
        raise DataError("another text than the key's was rated", field=f"data.{changed[0]}", cure=cure)
    found = []
    for annotation in row["annotations"]:
        if annotation.get("was_cancelled"):
            counts["annotations that raters skipped"] += 1
            continue
        given = _ratings(annotation, key.schema, counts)
        if given:
            time = str(annotation.get("updated_at") or annotation.get("created_at") or "")
            found.append((_rater(annotation), time, given))
        else:
            counts["annotations without a rating"] += 1
    return name, found


def _ratings(annotation: dict, schema: Schema, counts: Counter) -> dict[str, float]:
    given: dict[str, float] = {}
    for result in annotation.get("result") or ():
        name, kind = result.get("from_name"), result.get("type")
        if name not in schema.names:
            counts[f"results of '{name}', which is no attribute"] += 1
            continue
        value = (result.get("value") or {}).get(_VALUES.get(kind))
        if kind == "choices" and isinstance(value, list) and len(value) == 1:
            value = _number(value[0])
        rating = check_rating(value, schema[name])
        if name in given:
            raise DataError("rated twice in one annotation", field=name, cure="use the labelling configuration as is")
        given[name] = rating
    return given


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text  # which is refused as no number


def _rater(annotation: dict) -> str:
    """Label Studio's number of a user; never the name or the address."""
    who = annotation.get("completed_by")
    who = who.get("id") if isinstance(who, dict) else who
    if isinstance(who, bool) or not isinstance(who, int | str) or who == "":
        raise DataError("an annotation does not say who made it", field="completed_by", cure=_AS_JSON)
    return str(who)
