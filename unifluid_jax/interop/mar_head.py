"""MAR's diffusion head (arXiv 2406.11838), below `diffloss.net.` in its checkpoints."""

from unifluid_jax.interop.rules import Rule, Table


def _linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    name = f"diffloss.net.{theirs}"
    return (
        Rule(f"{ours}/kernel", f"{name}.weight", "O I -> I O"),
        Rule(f"{ours}/bias", f"{name}.bias"),
    )


_BLOCK = "diffloss.net.res_blocks.{layer}."
TABLES = (
    Table(
        "MAR's diffusion head",
        (
            *_linear("token_in", "input_proj"),
            *_linear("cond_in", "cond_embed"),
            *_linear("time_in", "time_embed.mlp.0"),
            *_linear("time_out", "time_embed.mlp.2"),
            Rule("blocks/norm/scale", _BLOCK + "in_ln.weight"),
            Rule("blocks/norm/bias", _BLOCK + "in_ln.bias"),
            *_linear("blocks/mlp_in", "res_blocks.{layer}.mlp.0"),
            *_linear("blocks/mlp_out", "res_blocks.{layer}.mlp.2"),
            *_linear("blocks/modulation", "res_blocks.{layer}.adaLN_modulation.1"),
            *_linear("final_modulation", "final_layer.adaLN_modulation.1"),
            *_linear("final_out", "final_layer.linear"),
        ),
    ),
)
