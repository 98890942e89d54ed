"""Gradients, features and gates from a stock model with merged weights and autograd alone.

Nothing here knows of LoRA layers, hooks or accumulators of lpdeploy: a model of the same function
is built from W + scaling B A in float64, and what a criterion should have seen is asked of it.
"""

from dataclasses import dataclass

import torch

from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.models.loading import get_model_classes
from tests import reference

# The float32 forward and backward pass of the LoRA model against float64; numbers that nearly
# cancel are measured against the largest of their spec.
RTOL, ATOL_OF_LARGEST = 1e-3, 1e-5


@dataclass
class Batch:
    """Rows padded on the right, in the micro-batches they are run in."""

    ids: torch.Tensor
    lengths: list[int]

    @property
    def mask(self):
        places = torch.arange(self.ids.shape[1])
        return (places < torch.tensor(self.lengths).unsqueeze(1)).long()

    @property
    def labels(self):
        return self.ids.masked_fill(self.mask == 0, -100)

    @property
    def targets(self):
        return torch.tensor(sum(length - 1 for length in self.lengths))

    def run(self, model, rows=slice(None)):
        """Loss of some rows, as their part of the mean over all rows."""
        longest = max(self.lengths[rows])
        return model(
            input_ids=self.ids[rows, :longest],
            labels=self.labels[rows, :longest],
            num_items_in_batch=self.targets,
            use_cache=False,
        ).loss


def make_rows(lengths=(12, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (len(lengths), max(lengths)), generator=generator)
    return Batch(ids, list(lengths))


class Independent:
    """The merged model in float64, and what it says of one batch."""

    def __init__(self, folder, causal_lm, specs, batch):
        _, model_class = get_model_classes(causal_lm.config.model_type)
        self.model = model_class.from_pretrained(folder).double()
        self.lora, self.frozen, self.specs, self.batch = {}, {}, specs, batch
        for piece in list_pieces(specs):
            linear = causal_lm.get_submodule(piece.module)
            lora = get_lora_weights(linear)
            a, b = lora.lora_a.detach().double(), lora.lora_b.detach().double()
            weight = get_base_linear(linear).weight.detach().double()
            self.lora[piece.module], self.frozen[piece.module] = (a, b, lora.scaling), weight
            self.model.get_submodule(piece.module).weight.data = weight + lora.scaling * b @ a

    def weight(self, module):
        return self.model.get_submodule(module).weight

    def compute_gradients(self):
        """dL/dW of every Linear, of one pass over the whole batch."""
        names = [piece.module for piece in list_pieces(self.specs)]
        loss = self.batch.run(self.model)
        return dict(zip(names, torch.autograd.grad(loss, map(self.weight, names)), strict=True))

    def record_inputs(self):
        """Input of every Linear, (B, T, in), part of the graph of the loss returned."""
        inputs, handles = {}, []
        for piece in list_pieces(self.specs):

            def hook(_, args, name=piece.module):
                inputs[name] = args[0]

            module = self.model.get_submodule(piece.module)
            handles.append(module.register_forward_pre_hook(hook))
        loss = self.batch.run(self.model)
        for handle in handles:
            handle.remove()
        return inputs, loss

    def compute_gate_gradients(self):
        """dL/dz of a gate z of ones for each sample and group: spec name -> (B, G)."""
        gates, handles = {}, []
        for spec in self.specs:
            piece = spec.slices[-1]
            gate = torch.ones(len(self.batch.lengths), spec.num_groups, dtype=torch.float64)
            gates[spec.name] = gate.requires_grad_()

            def hook(_, args, gate=gate, block=piece.block):
                return args[0] * gate.repeat_interleave(block, dim=1).unsqueeze(1)

            module = self.model.get_submodule(piece.module)
            handles.append(module.register_forward_pre_hook(hook))
        loss = self.batch.run(self.model)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, list(gates.values()))
        return dict(zip(gates, gradients, strict=True))

    def expect(self, criterion, spec, *, absolute=False, normalize=False):
        """What ``criterion`` should give for ``spec``, by the loops of the reference."""
        if criterion == "gate":
            inputs, loss = self.record_inputs()
            piece = spec.slices[-1]
            hidden = inputs[piece.module]
            (gradient,) = torch.autograd.grad(loss, hidden)
            both = hidden.tolist(), gradient.tolist()
            return torch.tensor(reference.gate_importance(*both, piece.block, absolute=absolute))
        total = torch.zeros(spec.num_groups, dtype=torch.float64)
        for piece in spec.slices:
            scores = self._score_weights(criterion, piece.module)
            scores = reference.raise_scores(scores, absolute=absolute)
            groups = reference.group_importance(scores, piece.dim, piece.block)
            groups = reference.normalized(groups) if normalize else groups
            total += torch.tensor(groups, dtype=torch.float64)
        return total

    def _score_weights(self, criterion, module):
        a, b, scaling = self.lora[module]
        lists = self.frozen[module].tolist(), a.tolist(), b.tolist()
        merged = reference.merged_weight(*lists, scaling)
        match criterion:
            case "gradient":
                return reference.gradient_importance(
                    merged, self.compute_gradients()[module].tolist()
                )
            case "magnitude":
                return merged
            case "wanda":
                hidden = self.record_inputs()[0][module].tolist()
                real = [
                    row[:length] for row, length in zip(hidden, self.batch.lengths, strict=True)
                ]
                return reference.wanda_importance(merged, reference.feature_norms(real))
            case "lora":
                # The layer computes x (W + scaling B A)^T, so the chain rule gives both gradients.
                gradient = scaling * self.compute_gradients()[module]
                grads = (b.T @ gradient).tolist(), (gradient @ a.T).tolist()
                squares = reference.weight_importance(*lists, *grads, scaling)
                return [[score**0.5 for score in row] for row in squares]
        raise AssertionError(criterion)


def list_pieces(specs):
    return [piece for spec in specs for piece in spec.slices]


def assert_scores(actual, expected):
    expected = expected.double()
    atol = ATOL_OF_LARGEST * expected.max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=atol)
