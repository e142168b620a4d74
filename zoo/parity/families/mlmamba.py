"""ML-Mamba's connector, with what its parts put out."""

from torch import Tensor

from zoo.heads.vlm import convert_connector
from zoo.heads.vlm.connectors import Mamba2ScanConnector
from zoo.parity.case import Case

__all__ = ["run"]

NAMES = dict(n_layer_connector="depth", headdim="head_dim", ngroups="groups")


def run(case: Case) -> dict[str, Tensor]:
    """Tokens, outputs of the parts before the last, and the features' gradient of the squared sum."""
    if case.class_name != "MambaVLM.mlp":
        raise ValueError(f"no builder for {case.class_name!r}")
    sizes = {NAMES.get(name, name): value for name, value in case.kwargs.items()}
    connector = Mamba2ScanConnector(sizes.pop("vision_dim"), sizes.pop("d_model"), **sizes)
    connector = case.load(connector, convert_connector(case.group("state")))
    patches = case.inputs()["patches"]
    outputs = {"output.after_mlp": connector.proj(patches)}
    outputs["output.after_block0"] = connector.blocks[0](outputs["output.after_mlp"])
    outputs["output.after_scan"] = connector.forward_features(patches)
    outputs["output.out"] = connector(patches)
    outputs["output.out"].square().sum().backward()
    return {**outputs, "grad.input.patches": patches.grad}
