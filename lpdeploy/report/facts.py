"""What is known of a run, from the files in it; nothing is computed anew."""

from collections.abc import Mapping
from dataclasses import dataclass

from lpdeploy.benchmark.results import LatencyResult
from lpdeploy.engines import list_exporting
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.exports import find_export
from lpdeploy.engines.verification import VerifyResult
from lpdeploy.errors import ArtifactError
from lpdeploy.evaluation.results import Evaluation, load_evaluation
from lpdeploy.manifest import StageRecord, load_stages
from lpdeploy.models.place import locate_model
from lpdeploy.models.record import ModelRecord, load_model_record
from lpdeploy.plan import PruningPlan, describe_method
from lpdeploy.records import find_record
from lpdeploy.report.forms import ExportSizes, Form, list_forms
from lpdeploy.run_folder import RunFolder

FIX = "Make it again, or delete it."


@dataclass(frozen=True)
class Facts:
    """What the stages of a run left.

    Attributes:
        run: The run.
        plan: Which groups stay.
        method: How they were chosen, in words.
        stages: The records of the stages that have run.
        model: What ``compact`` recorded; None before that.
        evaluations: One for each engine and precision, the newest first.
        bench: What the latency benchmark measured, or None.
        verification: What ``verify`` found, or None.
        forms: The dense and the pruned model as they were measured.
    """

    run: RunFolder
    plan: PruningPlan
    method: str
    stages: Mapping[str, StageRecord]
    model: ModelRecord | None
    evaluations: tuple[Evaluation, ...]
    bench: LatencyResult | None
    verification: VerifyResult | None
    forms: tuple[Form, ...]

    @property
    def name(self) -> str:
        """What the run is called: the name of its folder."""
        return self.run.path.resolve().name


def load_facts(run: RunFolder) -> Facts:
    """Read what the stages of a run left; hold the run meanwhile.

    Raises:
        ArtifactError: The run has no plan, a file in it has changed or cannot be read, or its
            exports or figures are of another model.
    """
    plan = run.load_plan()
    run.check_files()
    stages = load_stages(run.path)
    model = load_model_record(run.model)
    exports = _measure_exports(run)
    evaluations = _list_evaluations(run, model)
    bench = find_record(LatencyResult, run.benchmark, fix=FIX)
    return Facts(
        run=run,
        plan=plan,
        method=describe_method(stages["prune"].options if "prune" in stages else {}),
        stages=stages,
        model=model,
        evaluations=evaluations,
        bench=bench,
        verification=find_record(VerifyResult, run.verification, fix=FIX),
        forms=list_forms(model, evaluations, bench, exports),
    )


def _measure_exports(run: RunFolder) -> ExportSizes:
    """Return the bytes of each merged export, and refuse one that is of another model.

    Its figures would mislead.
    """
    sizes = {}
    for unmerged in (False, True):
        if run.get_model(unmerged=unmerged).is_dir():
            place = locate_model(run, unmerged=unmerged)
            for engine in list_exporting():
                folder = find_export(place, engine.name)
                if folder is not None and not unmerged:
                    contract = load_contract(folder, engine)
                    total = sum(file.bytes for file in contract.files.values())
                    sizes[engine.name, contract.precision] = total
    return sizes


def _list_evaluations(run: RunFolder, record: ModelRecord | None) -> tuple[Evaluation, ...]:
    newest = load_evaluation(run.evaluation, fix=FIX)
    if newest and record and newest.model_sha256 != record.sha256:
        raise ArtifactError(
            f"'{run.evaluation}' was measured on another model than '{run.model}' is now. "
            f"Run 'lpdeploy eval {run}' again, or delete the file."
        )
    return (newest, *newest.others) if newest else ()
