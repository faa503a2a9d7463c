"""What came of a batch: `report.json`, `metadata` for `datasets`, and a sheet of 64 pictures to look at."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffplug.demos.batch.failures import Failures
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.plan import Plan
from diffplug.demos.batch.render import Outcome
from diffplug.demos.batch.store import FolderStore, records_text, store
from diffplug.files import atomic_path, atomic_write, read_json, write_json

__all__ = ["write_reports"]

_SHOWN, _THUMB = 64, 160
_TEXTS = ("file_name", "id", "prompt", "negative_prompt", "sampler", "steer", "reward", "model", "dtype")
_WHOLES = ("seed", "steps", "width", "height", "particles", "particle")
_FLOATS = ("guidance", "eta", "strength", "evaluations", "reached")
_OBJECTS = ("options", "call", "meta")
COLUMNS = (*_TEXTS, *_WHOLES, *_FLOATS, *_OBJECTS)


def write_reports(
    job: Job, plan: Plan, outcomes: Sequence[Outcome], seconds: float, before: int
) -> dict[str, Any]:
    """Write the reports into the job's folder; return the one that is JSON.

    before: pictures of the manifest that were there when this run began.
    """
    finished = store(job.folder, job.layout)
    finished.refresh()
    rows = _by_id(finished)
    report = _report(job, plan, finished, rows, outcomes, seconds, before)
    if job.layout != "tar":
        wanted = [one for picture in plan.pictures for one in rows.get(picture.id, ())]
        _write_metadata(job.folder, wanted)
    if job.layout == "geneval":
        from diffplug.demos.batch.geneval import lay_out

        report["geneval"] = lay_out(job.folder, plan, rows)
    _write_sheet(job, plan, finished, rows)
    write_json(job.folder / "report.json", report)
    return report


def _by_id(finished: FolderStore) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every picture; where two shards have it, those of the first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in finished.names():
        for record in finished.records(name):
            if finished.done.get(record["id"]) == name:
                found.setdefault(record["id"], []).append(record)
    return found


def _report(
    job: Job,
    plan: Plan,
    finished: FolderStore,
    rows: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    seconds: float,
    before: int,
) -> dict[str, Any]:
    asked = {picture.id for picture in plan.pictures}
    failed = [one for one in Failures(job).all() if one["id"] in asked and one["id"] not in rows]
    made = sum(one.made for one in outcomes)
    calls: Counter[int] = Counter()
    for outcome in outcomes:
        calls.update(outcome.calls)
    return {
        "asked": plan.asked,
        "pictures": len(plan.pictures),
        "double_rows": plan.doubles,
        "there": sum(one in rows for one in asked),
        "there_before": before,
        "made": made,
        "failed": len(failed),
        "orphans": len(set(rows) - asked),
        "shards": len(finished.names()),
        "seconds": round(seconds, 2),
        "pictures_per_second": round(made / seconds, 3) if seconds > 0 else None,
        "evaluations": sum(one.evaluations for one in outcomes),
        "calls_by_pictures": {str(size): calls[size] for size in sorted(calls)},
        "hosts": dict(Counter(one.host for one in outcomes if one.made)),
        "failures": failed[:100],
        "job": read_json(job.folder / "job.json"),
    }


def _write_metadata(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one table for all pictures, with one type a column: parquet, or JSON lines without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        atomic_write(folder / "metadata.jsonl", records_text(_columns(one) for one in records))
        return
    kinds = {_TEXTS: pyarrow.string(), _WHOLES: pyarrow.int64(), _FLOATS: pyarrow.float64()}
    kinds[_OBJECTS] = pyarrow.string()
    schema = pyarrow.schema([(name, kind) for names, kind in kinds.items() for name in names])
    table = pyarrow.Table.from_pylist([_columns(one) for one in records], schema=schema)
    with atomic_path(folder / "metadata.parquet") as path:
        parquet.write_table(table, path)
    (folder / "metadata.jsonl").unlink(missing_ok=True)


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as one row of the table; every column is there."""
    values: dict[str, Any] = {name: record.get(name) for name in COLUMNS}
    values["file_name"] = record["file"]
    values["reached"] = next(iter(record.get("rewards", {}).values()), None)
    for name in _OBJECTS:
        if values[name] is not None:
            values[name] = json.dumps(values[name], sort_keys=True, ensure_ascii=False)
    return {name: float(v) if name in _FLOATS and v is not None else v for name, v in values.items()}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #18181b; background: #fff }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1.2rem }}
figure {{ margin: 0 }} img {{ width: 100%; image-rendering: auto; border: 1px solid #d4d4d8 }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }} small {{ color: #71717a }}
</style></head><body><h1>{title}</h1><p>{text}</p><main>
{figures}
</main></body></html>
"""


def _write_sheet(job: Job, plan: Plan, finished: FolderStore, rows: Mapping[str, Any]) -> None:
    """Write a page of 64 pictures, drawn by their ids; it holds its pictures and asks nothing of anybody."""
    drawn = [rows[name][0] for name in sorted(one.id for one in plan.pictures if one.id in rows)[:_SHOWN]]
    text = f"{len(drawn)} of {len(plan.pictures):,} pictures, drawn by their ids."
    figures = "\n".join(_figures(finished, drawn))
    title = html.escape(job.folder.resolve().name)
    atomic_write(job.folder / "contact_sheet.html", _PAGE.format(title=title, text=text, figures=figures))


def _figures(finished: FolderStore, drawn: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from PIL import Image

    for record in drawn:
        with Image.open(io.BytesIO(finished.read_picture(record))) as image:
            small = image.convert("RGB")
        small.thumbnail((_THUMB, _THUMB))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        prompt, facts = html.escape(record["prompt"]), html.escape(_facts(record))
        yield (
            f'<figure><img alt="{prompt}" src="data:image/png;base64,{data}">'
            f"<figcaption>{prompt}<br><small>{facts}</small></figcaption></figure>"
        )


def _facts(record: Mapping[str, Any]) -> str:
    """Return seed, sampler, evaluations and reward of a picture in a line."""
    parts = [f"seed {record['seed']}", str(record.get("sampler") or "the model's own sampler")]
    parts.append(f"{record['evaluations']:g} evaluations")
    parts += [f"{name} {value:.3f}" for name, value in record.get("rewards", {}).items()]
    return ", ".join(parts)
