"""Scores for data sets of other libraries: one value a row, by a model that a bundle holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hansa.bundle import read_bundle
from hansa.curation.scores import SCORES, Point, Sample, check_scores, measure
from hansa.data.answers import AnswerOptions, blank_prompt, pack_examples
from hansa.data.examples import STATS, Example
from hansa.data.tokenizer import tokenizer_from_json
from hansa.errors import InputError
from hansa.models.build import Architecture, objective_of, restore
from hansa.models.task import Task

NAMES = {"ifd": "ifd_score", "perplexity_whole": "llm_perplexity"}
"""What Data-Juicer's filters call a score of ours; others go by our names."""


class Scorer:
    """Scores batches of rows, as ``datasets.Dataset.map`` hands them out.

    Examples:
        >>> scorer = Scorer("runs/base/bundle", ["ifd"])
        >>> scored = dataset.map(scorer, batched=True)
        >>> kept = scored.filter(lambda row: (row["__dj__stats__"]["ifd_score"] or 9) < 0.9)

    Args:
        path: the bundle of a language model.
        scores: what to score by; not those that need other examples (gradients, duplicates).
        options: how questions and answers become sequences; that which the model learned by.

    Raises:
        InputError: no such bundle, one that holds no language model, or other scores.
    """

    def __init__(
        self,
        path: str | Path,
        scores: Sequence[str] = ("ifd",),
        options: AnswerOptions | None = None,
    ) -> None:
        check_scores(scores, "scores")
        for name in scores:
            if SCORES[name].gradients or name == "duplicates":
                raise InputError("scores", repr(name), "scores of single examples")
        held = read_bundle(Path(path))
        architecture = Architecture.model_validate(held.architecture)
        if not architecture.is_language or not held.tokenizer:
            raise InputError("path", f"{path}, no language model", "the bundle of one")
        self._scores, self._options = tuple(scores), options or AnswerOptions()
        self._tokenizer = tokenizer_from_json(held.tokenizer)
        objective = objective_of(architecture, self._tokenizer.bytes_of)
        self._task = Task(restore(held), objective)
        self._context = architecture.shape[0]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
        """Return ``__dj__stats__`` of each row of a batch: score -> value, beside what is there.

        Rows without an answer, and those too long for the model, have None.

        Raises:
            InputError: a field that is missing.
        """
        fields = self._options.fields
        for name in (fields.question, fields.answer):
            if name not in batch:
                raise InputError(f"fields.{name}", "no such column", ", ".join(batch))
        columns = zip(batch[fields.question], batch[fields.answer], strict=True)
        rows = [Example(str(k), q or "", a or "") for k, (q, a) in enumerate(columns)]
        packed = pack_examples(rows, self._options, self._context, self._tokenizer)
        before = batch.get(STATS) or [None] * len(rows)
        mine = dict.fromkeys(NAMES.get(name, name) for name in self._scores)
        stats: list[dict[str, Any]] = [{**(each or {}), **mine} for each in before]
        if packed.examples:
            task, blank = self._task, blank_prompt(self._options, self._tokenizer)
            pair = packed.inputs, packed.labels
            sample = Sample(task, task.buffers, Point(task.params), [], pair, blank)
            for name, values in measure(self._scores, sample).items():
                for example, value in zip(packed.examples, values.tolist(), strict=True):
                    stats[int(example.id)][NAMES.get(name, name)] = value
        return {STATS: stats}
