"""K: which layers' norms are found, and which models and names are refused."""

import pytest
import torch

from pretrain.errors import UserError
from pretrain.influence.ghost import GhostNorms
from tests.influence.ghosts import SETUPS, Setup, assert_close, batch_of, case, gradients_alone, norms_of, record

BERT = "encoder.backbone.encoder.layer."
SOME = (f"{BERT}0.output", f"{BERT}1.output", f"{BERT}1.attention")
ESM = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def names_of(model, ghost: GhostNorms) -> set[str]:
    measured = {id(each) for each in ghost.parameters}
    return {name for name, each in model.named_parameters() if id(each) in measured}


@pytest.mark.parametrize(
    ("name", "layers", "score", "expected"),
    [
        ("bert", "first_block", "gram", lambda name: name.startswith(f"{BERT}0.")),
        ("bert", [f"{BERT}?.output", f"{BERT}1.attention*"], "gram", lambda name: name.startswith(SOME)),
        ("bert", "layer_norms", "gram", lambda name: "LayerNorm" in name),
        ("bert", "all", "layer_norm", lambda name: "LayerNorm" in name),
        ("bert", "first_block", "layer_norm", lambda name: name.startswith(f"{BERT}0.") and "LayerNorm" in name),
        ("modernbert", "first_block", "gram", lambda name: ".layers.0." in name),
        ("t5", "first_block", "gram", lambda name: ".block.0." in name),
        ("gpt2", "first_block", "gram", lambda name: ".h.0." in name),
    ],
)
def test_k_is_what_its_names_say(name, layers, score, expected):
    own = case(name)
    ghost = GhostNorms(own.model, layers, score)
    names = names_of(own.model, ghost)
    wanted = {name for name in own.exact[0] if expected(name)}
    assert names == wanted
    assert_close(record(own.model, own.padded, ghost), norms_of(own.exact, names))
    own.model.zero_grad()


def test_a_tied_matrix_is_one_whichever_of_its_modules_is_named():
    own = case("bert")
    table = GhostNorms(own.model, "encoder.backbone.embeddings.word_embeddings", "gram")
    head = GhostNorms(own.model, "heads.vocabulary.layers.cls.predictions.decoder", "gram")
    assert names_of(own.model, table) == names_of(own.model, head)
    norms = record(own.model, own.packed, table)
    assert torch.equal(norms, record(own.model, own.packed, head))
    assert_close(norms, norms_of(own.exact, names_of(own.model, table)))
    own.model.zero_grad()


@pytest.mark.parametrize(
    ("name", "layers", "score", "message"),
    [
        (
            "bert",
            "layer_nroms",
            "gram",
            r"^weigher\.layers: unknown module 'layer_nroms'; did you mean 'layer_norms'\?$",
        ),
        ("bert", [f"{BERT}9"], "gram", rf"^weigher\.layers: unknown module '{BERT}9'; did you mean '{BERT}[01]'\?$"),
        (
            "bert",
            f"{BERT}0.output.dense",
            "layer_norm",
            "^weigher.layers: there is no normalisation that is trained in",
        ),
        ("bert", f"{BERT}0.output.dropout", "gram", "^weigher.layers: there is no layer that is trained in"),
    ],
)
def test_a_wrong_name_is_told_in_one_line_with_the_nearest(name, layers, score, message):
    with pytest.raises(UserError, match=message):
        GhostNorms(case(name).model, layers, score)


def test_layers_whose_rows_are_no_samples_are_refused_by_name_and_the_others_are_right():
    setup = Setup("deberta-v2", "mlm", keys={"masking": {"rate": 0.4}})
    model, batch = setup.model(), batch_of(setup, packed=False)
    for layers in ("all", "first_block"):
        with pytest.raises(UserError, match=r"^weigher\.layers: .*pos_key_proj\.weight is part of it"):
            GhostNorms(model, layers, "gram")
    ghost = GhostNorms(model, ["layer_norms", "encoder.backbone.encoder.layer.*.output"], "gram")
    norms = record(model, batch, ghost)
    exact = gradients_alone(model, batch)
    assert_close(norms, norms_of(exact, names_of(model, ghost) - {"encoder.backbone.encoder.LayerNorm.weight"}))
    assert "pos_key_proj" in ghost.why_not_deferred
    with pytest.raises(RuntimeError, match="pos_key_proj"), ghost.recording(batch, deferred=True):
        pass


@pytest.mark.parametrize(
    ("setup", "lost"),
    [
        (Setup("esm", "mlm", ESM), r"heads\.vocabulary\.layers\.lm_head\.bias"),
        (Setup("bart", "denoise"), "'bart' adds a constant to its logits"),
    ],
)
def test_a_parameter_beside_layers_is_refused_by_name(setup, lost):
    model = setup.model()
    with pytest.raises(UserError, match=rf"^weigher\.layers: {lost}"):
        GhostNorms(model, "all", "gram")
    assert (GhostNorms(model, "first_block", "gram").why_not_deferred is None) == (setup.family == "bart")


@pytest.mark.parametrize("family", ["albert", "qwen3"])
def test_shared_layers_and_norms_of_heads_are_told_apart(family):
    """ALBERT runs one block several times; Qwen's queries have a norm whose scale is every head's."""
    keys = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    keys |= {"embedding_size": 24} if family == "albert" else {"num_key_value_heads": 2, "head_dim": 16}
    setup = Setup(family, "mlm" if family == "albert" else "clm", keys)
    model, batch = setup.model(), batch_of(setup)
    ghost = GhostNorms(model, "all", "gram")
    assert ghost.why_not_deferred is None
    assert_close(record(model, batch, ghost), norms_of(gradients_alone(model, batch)))


def test_a_layer_that_is_trained_in_part_is_refused():
    model = SETUPS["bert"].model()
    model.encoder.backbone.encoder.layer[1].output.dense.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"^weigher\.layers: .*layer\.1\.output\.dense\.bias is part of it"):
        GhostNorms(model, "all", "gram")
    assert "layer.1.output.dense.bias" in GhostNorms(model, "first_block", "gram").why_not_deferred


def test_frozen_parameters_are_never_looked_at():
    model = SETUPS["bert"].model()
    for parameter in model.encoder.backbone.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="no layer that is trained in first_block"):
        GhostNorms(model, "first_block", "gram")
    ghost = GhostNorms(model, "all", "gram")
    batch = case("bert").packed
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    assert_close(record(model, batch, ghost, deferred=True), norms_of(case("bert").exact, names))
    ghost.injected(torch.ones(8)).backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == names
