"""SigLIP's vision tower as big_vision stores it: .npz, names joined by "/".

Layers are stacked ("encoderblock/...", of a model run by scan) or apart ("encoderblock_3/...").
"""

from unifluid_jax.interop.rules import Rule, Table


def _rules(block: str, stacked: bool) -> tuple[Rule, ...]:
    def layer(ours: str, theirs: str) -> Rule:
        return Rule(f"blocks/{ours}", f"{block}/{theirs}", stacked=stacked)

    attention = "MultiHeadDotProductAttention_0"
    pairs = [
        ("attention_norm", "LayerNorm_0", ("scale", "bias")),
        ("query", f"{attention}/query", ("kernel", "bias")),
        ("key", f"{attention}/key", ("kernel", "bias")),
        ("value", f"{attention}/value", ("kernel", "bias")),
        ("attention_out", f"{attention}/out", ("kernel", "bias")),
        ("mlp_norm", "LayerNorm_1", ("scale", "bias")),
        ("mlp_in", "MlpBlock_0/Dense_0", ("kernel", "bias")),
        ("mlp_out", "MlpBlock_0/Dense_1", ("kernel", "bias")),
    ]
    return (
        Rule("patch_in/kernel", "embedding/kernel", "p q C W -> (p q C) W"),
        Rule("patch_in/bias", "embedding/bias"),
        Rule("positions", "pos_embedding", "1 M W -> M W"),
        *(
            layer(f"{ours}/{name}", f"{theirs}/{name}")
            for ours, theirs, names in pairs
            for name in names
        ),
        Rule("final_norm/scale", "Transformer/encoder_norm/scale"),
        Rule("final_norm/bias", "Transformer/encoder_norm/bias"),
    )


_SPELLINGS = ((r"^params/", ""), (r"^img/", ""))
# Text tower, pooling head, the contrastive loss's scalars.
_IGNORED = (r"txt/.*", r"MAPHead_0/.*", r"head/.*", "t", "b", r"opt/.*")

STACKED = Table(
    "big_vision SigLIP, stacked layers",
    _rules("Transformer/encoderblock", True),
    _SPELLINGS,
    _IGNORED,
)
APART = Table(
    "big_vision SigLIP", _rules("Transformer/encoderblock_{layer}", False), _SPELLINGS, _IGNORED
)
TABLES = (STACKED, APART)
