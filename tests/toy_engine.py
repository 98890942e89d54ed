"""An engine from outside the package: the weights under a contract of their own, run by torch.

A module, so that the processes that ``bench latency`` starts can import what the record names.
"""

from lpdeploy.engines.contract import Contract, load_contract, save_contract
from lpdeploy.engines.engine import Engine
from lpdeploy.engines.exporting import (
    carry_settings,
    describe_files,
    describe_model,
    describe_source,
    resolve_max_seq_len,
)
from lpdeploy.engines.torch.runner import TorchRunner
from lpdeploy.folders import atomic_folder
from lpdeploy.machine import list_versions
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.run_folder import EXPORT


class ToyRunner(TorchRunner):
    name = "toy"


def export_toy(
    model_folder,
    output,
    *,
    adapter=None,
    overwrite=False,
    precision="fp32",
    max_batch=8,
    max_seq_len=None,
):
    config = load_config(model_folder)
    with atomic_folder(output, kind=EXPORT, overwrite=overwrite) as folder:
        load_model(model_folder, dtype=precision).save_pretrained(folder)
        carry_settings(model_folder, folder)
        contract = Contract(
            engine=TOY.name,
            precision=precision,
            opset=None,
            merged=adapter is None,
            inputs=(),
            outputs=(),
            model=describe_model(config, model_folder),
            max_batch=max_batch,
            max_seq_len=resolve_max_seq_len(max_seq_len, config),
            source=describe_source(model_folder, adapter),
            files=describe_files(folder, "model.safetensors"),
            versions=list_versions(),
        )
        save_contract(contract, folder, TOY)
    return contract


def load_toy(folder, *, device=None):
    contract = load_contract(folder, TOY)
    contract.check_files(folder, fix=TOY.fix)
    return ToyRunner(load_model(folder, dtype=contract.precision, device=device or "cpu"))


TOY = Engine(
    name="toy",
    summary="the weights again, for a test",
    load=load_toy,
    export=export_toy,
    contract_file="toy.json",
    main_file="model.safetensors",
    precisions=("fp32", "bf16"),
    options=("max_batch", "max_seq_len"),
    hub_card="`toy/`: the weights again",
)
