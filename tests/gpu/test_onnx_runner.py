"""ONNX Runtime gives the same logits on a GPU as on a CPU."""

import pytest
import torch

from lpdeploy.engines.onnx.runner import load_onnx_runner
from tests.helpers import make_batch, make_export


def test_cuda_equals_cpu():
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    folder = make_export("per-layer")[2]
    ids, mask = make_batch([7, 5], vocab_size=300)
    cpu, cuda = (
        load_onnx_runner(folder, device=device).forward(ids, attention_mask=mask).logits.cpu()
        for device in ("cpu", "cuda")
    )
    # TF32 products keep 10 bits of the factors.
    torch.testing.assert_close(cuda[mask.bool()], cpu[mask.bool()], atol=2e-2, rtol=0)
