"""Muntin's models beside the libraries that have them, all with the same weights; what peers.py and parity.py compare.

Each peer is built with random weights, norms and bias tables among them, and its own state dict is loaded into
Muntin's model. Swin-Free is in no library: its peers are put together from a library's own blocks, one window per
stage and no shift, which the blocks' own constructors take. RMT is in none either: its peer is the authors' form of
the computation (rmt_authors.py). EfficientViT is timm's, also with its BatchNorms folded by timm itself.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from rmt_authors import authors_form
from torch import Tensor, nn

import muntin
from muntin.layers.opaque import Programmed
from muntin.measure.bench import LogitsOnly, transformers_swin
from muntin.measure.peers import ChannelsLast, randomise
from muntin.runtime import fold
from muntin.weights import convert

MODELS = {
    "swin": ("swin_t", "swin_s", "swin_b", "swin_free_t", "swin_free_b"),
    "swinv2": ("swinv2_t",),
    "efficientvit": tuple(f"efficientvit_m{i}" for i in range(6)),
    "rmt": ("rmt_t", "rmt_s"),
}
LAYERS = "muntin.optimize (layers)"
BOUND = 1e-4  # largest difference of outputs, in standard deviations
SIZE = 224
SIZES = {"swinv2": 256}  # pixels, of the other families 224
Peers = dict[str, nn.Module]


def _free(config: Any) -> bool:
    return not any(config.per_stage("shift"))


def timm_peer(config: Any, fused: bool, classes: int = 1000) -> nn.Module:
    """timm's Swin; its fused attention is behind an experimental switch."""
    from timm import layers
    from timm.layers import config as switches
    from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

    before = switches._USE_FUSED_ATTN
    layers.set_fused_attn(fused, experimental=fused)
    try:
        model = SwinTransformer(
            img_size=SIZE,
            embed_dim=config.dim,
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.per_stage("window")[0],
            num_classes=classes,
            drop_path_rate=0.0,
        )
        if _free(config):
            stages: Any = model.layers
            for s, stage in enumerate(stages):
                stage.blocks = nn.Sequential(
                    *(
                        SwinTransformerBlock(
                            config.dim * 2**s,
                            stage.output_resolution,
                            config.heads[s],
                            window_size=config.per_stage("window")[s],
                            shift_size=0,
                        )
                        for _ in stage.blocks
                    )
                )
    finally:
        switches._USE_FUSED_ATTN = before
    return model


def torchvision_peer(config: Any, classes: int = 1000) -> nn.Module:
    """torchvision's Swin; it has no fused attention."""
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock

    window = config.per_stage("window")
    model = SwinTransformer(
        [config.patch, config.patch],
        config.dim,
        list(config.depths),
        list(config.heads),
        [window[0], window[0]],
        stochastic_depth_prob=0.0,
        num_classes=classes,
    )
    if _free(config):
        for s, heads in enumerate(config.heads):
            model.features[2 * s + 1] = nn.Sequential(
                *(
                    SwinTransformerBlock(config.dim * 2**s, heads, [window[s], window[s]], [0, 0])
                    for _ in range(config.depths[s])
                )
            )
    return model


def transformers_peer(name: str, config: Any, classes: int = 1000) -> nn.Module:
    """transformers' Swin with scaled_dot_product_attention."""
    from transformers.models.swin.modeling_swin import SwinLayer

    wrapped = transformers_swin(name.replace("_free", ""), (SIZE, SIZE), classes)
    if _free(config):
        for s, stage in enumerate(wrapped.model.swin.encoder.layers):
            own = copy.deepcopy(stage.config)
            own.window_size = config.per_stage("window")[s]
            own._attn_implementation = "sdpa"
            resolution = stage.blocks[0].input_resolution
            stage.blocks = nn.ModuleList(
                SwinLayer(own, config.dim * 2**s, resolution, config.heads[s], shift_size=0) for _ in stage.blocks
            )
    return wrapped


def peer_of_timm(name: str) -> nn.Module:
    """timm's Swin in the shape of our variant."""
    with torch.device("meta"):
        config = muntin.create_model(name).config
    return timm_peer(config, fused=False)


def difference(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().std()).item()


def by_layers(fast: nn.Module) -> nn.Module:
    """An optimised copy as it is where no compiler is at hand: its layers packed for oneDNN, and no programs."""
    slow = copy.deepcopy(fast)
    for module in slow.modules():
        if isinstance(module, Programmed):
            module.program = None
    return slow


def swin_peers(name: str, seed: int) -> Peers:
    """Muntin's model first, then its copies and the peers, all with timm's random weights."""
    ours = muntin.create_model(name).eval()
    config = ours.backbone.config
    first = randomise(timm_peer(config, fused=False), (SIZE, SIZE), seed)
    muntin.load_checkpoint(ours, first.state_dict())
    fast = muntin.optimize(ours)
    peers = {
        "muntin": ours,
        "muntin.optimize": fast,
        LAYERS: by_layers(fast),
        "timm": first,
        "timm (SDPA)": timm_peer(config, fused=True),
        "torchvision": torchvision_peer(config),
        "transformers (SDPA)": transformers_peer(name, config),
    }
    for label in ("timm (SDPA)", "torchvision", "transformers (SDPA)"):
        share(ours, peers[label])
    return peers


def swinv2_peers(name: str, seed: int) -> Peers:
    """The libraries' SwinV2; none of them has fused attention for it."""
    import timm
    import transformers
    from torchvision import models

    ours = muntin.create_model(name).eval()
    c = ours.config
    first = randomise(
        timm.create_model(f"swinv2_{WORDS[name[-1]]}_window8_256", img_size=SIZES["swinv2"]), (SIZE, SIZE), seed
    )
    muntin.load_checkpoint(ours, first.state_dict())
    shape = {"image_size": SIZES["swinv2"], "embed_dim": c.dim, "depths": list(c.depths), "num_heads": list(c.heads)}
    config: Any = transformers.Swinv2Config(window_size=8, **shape)
    config.num_labels = 1000
    fast = muntin.optimize(ours)
    peers = {
        "muntin": ours,
        "muntin.optimize": fast,
        LAYERS: by_layers(fast),
        "timm": first,
        "torchvision": models.get_model(f"swin_v2_{name[-1]}", weights=None),
        "transformers": LogitsOnly(transformers.Swinv2ForImageClassification(config)),
    }
    # torchvision has a bias of the keys, which its forward sets to zero: `share` would not know what belongs there
    peers["torchvision"].load_state_dict(convert(ours.state_dict(), "torchvision"), strict=False)
    share(ours, peers["transformers"])
    return peers


WORDS = {"t": "tiny", "s": "small", "b": "base"}


def efficientvit_peers(name: str, seed: int) -> Peers:
    """timm's EfficientViT as it is created, with its BatchNorms folded by timm, and that in channels-last memory."""
    import timm
    from timm.utils import reparameterize_model

    ours = muntin.create_model(name).eval()
    first = randomise(timm.create_model(name), (SIZE, SIZE), seed)
    muntin.load_checkpoint(ours, first.state_dict())
    folded = reparameterize_model(first)
    fast = muntin.optimize(ours)
    return {
        "muntin": ours,
        "muntin (BN folded)": fold(ours),
        "muntin.optimize": fast,
        LAYERS: by_layers(fast),
        "timm": first,
        "timm (BN folded)": folded,
        "timm (BN folded, channels last)": ChannelsLast(copy.deepcopy(folded)),
    }


def rmt_peers(name: str, seed: int) -> Peers:
    """The authors' form of the computation; no library has RMT."""
    ours = randomise(muntin.create_model(name), (SIZE, SIZE), seed)
    fast = muntin.optimize(ours)
    return {
        "muntin": ours,
        "muntin (BN folded)": fold(ours),
        "muntin.optimize": fast,
        LAYERS: by_layers(fast),
        "authors' form": authors_form(ours),
    }


FAMILIES: dict[str, Callable[[str, int], Peers]] = {
    "swin": swin_peers,
    "swinv2": swinv2_peers,
    "efficientvit": efficientvit_peers,
    "rmt": rmt_peers,
}


def build(family: str, name: str, seed: int = 0) -> tuple[list[tuple[str, nn.Module]], dict[str, float]]:
    """Muntin's model, its copies and the peers, and how far each one's outputs are from Muntin's in standard
    deviations.

    Raises SystemExit where a peer computes something else.
    """
    peers = FAMILIES[family](name, seed)
    size = SIZES.get(family, SIZE)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        wanted = peers["muntin"](images)
        errors = {label: difference(peer.eval()(images), wanted) for label, peer in peers.items()}
    for label, error in errors.items():
        if not error <= BOUND:
            sys.exit(f"{name}: {label} differs by {error:.1e} standard deviations; nothing was timed")
    return list(peers.items()), errors


def share(ours: nn.Module, peer: nn.Module) -> None:
    """Our weights into a peer, by the way back that loading the peer into ours shows.

    Every number of the peer gets a tag, and the tags are loaded into a copy of ours: what stands there now says
    where each of our numbers belongs, whatever the names, the order and the parts that a matrix is split into.
    """
    network = getattr(peer, "model", peer)
    tags, count = {}, 0
    for name, p in network.named_parameters():
        tags[name] = torch.arange(count, count + p.numel(), dtype=torch.float64).view_as(p)
        count += p.numel()
    tagged = copy.deepcopy(ours).double()
    muntin.load_checkpoint(tagged, tags)
    values = torch.full((count,), float("nan"))
    with torch.no_grad():
        for own, tag in zip(ours.parameters(), tagged.parameters(), strict=True):
            values[tag.flatten().long()] = own.flatten()
        if values.isnan().any():
            sys.exit(f"{type(network).__name__} has weights that Muntin's model has not; nothing was timed")
        for name, p in network.named_parameters():
            p.copy_(values[tags[name].flatten().long()].view_as(p))
