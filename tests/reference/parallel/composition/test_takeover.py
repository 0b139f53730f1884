"""What a wrapper takes over stays what it was: names, whole shapes, requires_grad, which names are
one parameter, dtypes, buffers, values, training or not. One test, for all wrappers."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from reference.lora import LoRAConfig, add_adapter
from reference.parallel.pipeline import recompute
from reference.parallel.ranks import run
from reference.quantization import make_qlora
from tests.reference.parallel.composition import workload
from tests.reference.parallel.composition.cells import REFUSED, TECHNIQUES
from tests.reference.parallel.composition.features import Feature
from tests.reference.parallel.composition.workload import fresh, kinds_of, probed, state_of

LORA = LoRAConfig(rank=2, alpha=4.0, targets="all-linear")
TAKEN_APART = {"TP", "TP-SP"}  # parts are other objects than the whole


@dataclass
class Found:
    """Of one rank, after a wrapper has taken the model over."""

    kinds: dict
    state: dict
    training: dict
    kept: set  # names of parameters that are the objects that they were


def partly(model, dtype=torch.float32):
    """Some frozen, some not in training, in one dtype."""
    model.to(dtype)
    model.layers[0].mlp.requires_grad_(False)
    model.embed_tokens.requires_grad_(False)
    model.layers[1].eval()
    return model


MODELS = {
    "tied": lambda: partly(fresh(is_tied=True)),
    "bfloat16": lambda: partly(fresh(), torch.bfloat16),
    "buffers": lambda: partly(probed()),
}


def by_technique(comm, technique, make):
    model = make()
    objects = dict(model.named_parameters())
    if technique.way.starts_from_rank_0 and comm.rank:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
    way = technique.way(comm, model, Feature("nothing more", has_probe=True))
    module = getattr(way.taken, "module", way.taken)
    kept = {n for n, p in module.named_parameters() if objects.get(n) is p}
    training = {n: m.training for n, m in module.named_modules()}
    return Found(way.kinds(), way.state(), training, kept)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_invariant_a_model_that_ranks_take_over_stays_what_it_was(technique, kind):
    model = MODELS[kind]()
    program = partial(by_technique, technique=technique, make=MODELS[kind])
    words, _ = REFUSED.get((technique.name, f"{kind} and unused parameters"), (None, ""))
    if words is not None:
        with pytest.raises(ValueError, match=words):
            run(technique.size, program, is_measured=False)
        return
    results = run(technique.size, program, is_measured=False).results
    assert {name for r in results for name in r.kinds} == kinds_of(model).keys()
    assert {name for r in results for name in r.state} == state_of(model).keys()
    for found in results:
        is_apart = technique.name in TAKEN_APART
        _check(model, found, set() if is_apart else dict(model.named_parameters()).keys())


def _check(model, found, objects):
    """`objects`: names of parameters that are to be the same objects."""
    kinds, state = kinds_of(model), state_of(model)
    for name, kind in found.kinds.items():
        assert kind == kinds[name], name
    for name, tensor in found.state.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert found.kept == objects & found.kinds.keys()
    training = {n: m.training for n, m in model.named_modules()}
    common = training.keys() & found.training.keys()
    assert common and all(found.training[n] == training[n] for n in common)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapt", [lambda m: add_adapter(m, LORA), lambda m: make_qlora(m, LORA)],
                         ids=["LoRA", "QLoRA"])  # fmt: skip
def test_invariant_adapters_change_nothing_but_what_learns(adapt, kind):
    """Adapters apart, and what QLoRA has put into four bits: all else is there, and frozen."""
    model, adapted = MODELS[kind](), MODELS[kind]()
    adapted.load_state_dict(model.state_dict())
    objects = dict(adapted.named_parameters())
    adapt(adapted)
    found = {
        n.replace(".base.", "."): t for n, t in state_of(adapted).items() if "adapter" not in n
    }
    quantised = state_of(model).keys() - found.keys()
    assert all(name.endswith("proj.weight") for name in quantised)
    for name in state_of(model).keys() - quantised:
        assert torch.equal(found[name], state_of(model)[name]), name
        assert found[name].dtype == state_of(model)[name].dtype
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("adapter" in name), name
        if "adapter" not in name:
            assert parameter is objects[name.replace(".base.", ".")]
    modes = dict(adapted.named_modules())
    for name, module in model.named_modules():
        assert modes[name].training == module.training, name


@pytest.mark.parametrize("kind", MODELS)
def test_invariant_recomputation_leaves_the_model_as_it_was(kind):
    model, plain = MODELS[kind](), MODELS[kind]()
    objects, (tokens, _) = dict(model.named_parameters()), workload.texts(0, False)
    recompute(model, tokens).float().logsumexp(-1).sum().backward()
    plain(tokens).float().logsumexp(-1).sum().backward()
    training = {name: module.training for name, module in model.named_modules()}
    names = {name for name, p in model.named_parameters() if objects[name] is p}
    _check(plain, Found(kinds_of(model), state_of(model), training, names), names)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
