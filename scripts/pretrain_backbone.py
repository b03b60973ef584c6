"""Pre-train a shipped backbone on Fashion-MNIST without labels (NNCLR), on a CPU in less than an hour.

Method: Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
Representations" (arXiv 2104.14548): the positive of a view is the nearest neighbour, in a queue of past
embeddings, of the other view of the same image. Labels are read only to print the figures of the model card.

    python scripts/pretrain_backbone.py --out sfm_fast/backbones/assets/fashion_vit.safetensors --minutes 50
    python scripts/pretrain_backbone.py --arch cnn --out sfm_fast/backbones/assets/fashion_cnn.safetensors --epochs 18
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sfm_fast.backbones.shipped import build_shipped
from sfm_fast.data import fashion_mnist

SIZE = 28


def architecture(args: argparse.Namespace) -> dict:
    """A timm class and its arguments, which are in the file's metadata and from which `build_shipped` builds."""
    if args.arch == "vit":
        return {
            "timm_class": "VisionTransformer",
            "img_size": SIZE,
            "patch_size": args.patch,
            "in_chans": 1,
            "num_classes": 0,
            "embed_dim": args.dim,
            "depth": args.depth,
            "num_heads": args.dim // 64,
            "class_token": False,
            "global_pool": "avg",
            "mlp_ratio": args.mlp_ratio,
        }
    # A residual net of three stages, 14, 7 and 4 px, each with one "basic" block of two 3 x 3 convolutions, as in ResNet.
    blocks = [
        {"type": "basic", "d": 1, "c": width, "s": stride, "gs": 0, "br": 1.0}
        for width, stride in zip(args.widths, (1, 2, 2), strict=True)
    ]
    return {
        "timm_class": "ByobNet",
        "img_size": SIZE,
        "in_chans": 1,
        "num_classes": 0,
        "global_pool": "avg",
        "cfg": {"blocks": blocks, "stem_chs": 32, "stem_type": "3x3", "stem_pool": "", "act_layer": "silu"},
    }


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def augment(x: torch.Tensor, generator: torch.Generator, min_area: float) -> torch.Tensor:
    """One random view of each image: x (B, 1, 28, 28) in 0..1 -> normalised (B, 1, 28, 28)."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(x), generator=generator) * (high - low) + low

    area, ratio = uniform(min_area, 1.0), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = torch.sqrt(area * ratio).clamp(max=1.2), torch.sqrt(area / ratio).clamp(max=1.2)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle = uniform(-0.2, 0.2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift_x, shift_y = uniform(-1, 1) * (1 - width).abs(), uniform(-1, 1) * (1 - height).abs()
    theta = torch.stack([flip * width * cos, -height * sin, shift_x, flip * width * sin, height * cos, shift_y], 1)
    view = F.grid_sample(
        x, F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False), align_corners=False
    )
    column = (-1, 1, 1, 1)
    view = view.clamp(min=0) ** torch.exp(uniform(-0.5, 0.5)).view(column)  # gamma
    view = view * uniform(0.5, 1.4).view(column) + (uniform(0, 1) < 0.2).float().view(column) * uniform(0, 0.6).view(
        column
    )
    noisy = (uniform(0, 1) < 0.5).float() * uniform(0, 0.2)
    view = view + noisy.view(column) * torch.randn(x.shape, generator=generator)
    return (view - fashion_mnist.MEAN) / fashion_mnist.STD


def symmetric_cross_entropy(similarity: torch.Tensor) -> torch.Tensor:
    own = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


@torch.no_grad()
def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [
            model((x.float().unsqueeze(1) / 255 - fashion_mnist.MEAN) / fashion_mnist.STD).float()
            for x in images.split(1000)
        ]
    return torch.cat(parts)


def nearest_class_mean(train: torch.Tensor, train_y: torch.Tensor, test: torch.Tensor, test_y: torch.Tensor) -> float:
    centres = torch.stack([train[train_y == c].mean(0) for c in range(10)])
    return (torch.cdist(test, centres).argmin(1) == test_y).float().mean().item()


def linear_probe(train: torch.Tensor, train_y: torch.Tensor, test: torch.Tensor, test_y: torch.Tensor) -> float:
    """Softmax regression on standardised features, run to convergence by L-BFGS: accuracy on the test set."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(10, train.shape[1], requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_y) + 1e-5 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return (F.linear(test, weight, bias).argmax(1) == test_y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", default=None, help="folder of the IDX files")
    parser.add_argument("--minutes", type=float, default=50, help="wall-clock budget; sets the length of the schedule")
    parser.add_argument("--epochs", type=float, default=0, help="fixed length instead of --minutes")
    parser.add_argument("--arch", choices=("vit", "cnn"), default="vit")
    parser.add_argument("--widths", type=int, nargs=3, default=(64, 128, 256), help="channels of the cnn's stages")
    parser.add_argument("--patch", type=int, default=7)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--mlp-ratio", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--temperature", type=float, default=0.15)
    parser.add_argument("--queue", type=int, default=16384)
    parser.add_argument("--min-area", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    (train, train_y), (test, test_y) = (fashion_mnist.load_full(s, args.data) for s in ("train", "test"))
    train, train_y, test, test_y = (torch.from_numpy(a) for a in (train, train_y, test, test_y))

    config = architecture(args)
    student = build_shipped(config).to(memory_format=torch.channels_last)
    dim = int(student.num_features)  # type: ignore[arg-type]
    average = copy.deepcopy(student).requires_grad_(False)
    projector, predictor = mlp(dim, 512, 128), mlp(128, 512, 128)
    parameters = [*student.parameters(), *projector.parameters(), *predictor.parameters()]
    decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    queue = F.normalize(torch.randn(args.queue, 128), dim=1)
    steps_per_epoch = len(train) // args.batch
    step, start, progress, last_print = 0, time.time(), 0.0, 0.0
    losses: list[float] = []
    while progress < 1:
        order = torch.randperm(len(train), generator=generator)[: steps_per_epoch * args.batch]
        for index in order.split(args.batch):
            elapsed = time.time() - start
            progress = step / (args.epochs * steps_per_epoch) if args.epochs else elapsed / (args.minutes * 60)
            if progress >= 1:
                break
            lr = args.lr * min(1, (step + 1) / (2 * steps_per_epoch)) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimiser.param_groups:
                group["lr"] = lr
            x = train[index].float().unsqueeze(1) / 255
            views = torch.cat([augment(x, generator, args.min_area), augment(x, generator, args.min_area)])
            student.train()
            with torch.autocast("cpu", torch.bfloat16):
                h = student(views)
            z = projector(h.float())
            p1, p2 = F.normalize(predictor(z), dim=1).chunk(2)
            z1, z2 = F.normalize(z, dim=1).chunk(2)
            with torch.no_grad():
                n1, n2 = (queue[(z_ @ queue.T).argmax(1)] for z_ in (z1, z2))
            # Half the weight is on the other view itself, for the start, when the queue is still noise.
            targets = ((n1, p2), (n2, p1), (z1.detach(), p2), (z2.detach(), p1))
            loss = sum((symmetric_cross_entropy(a @ b.T / args.temperature) for a, b in targets), torch.zeros(())) / 4
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 3.0)
            optimiser.step()
            with torch.no_grad():
                queue = torch.cat([z1.detach(), queue])[: args.queue]
                decay = min(0.998, (1 + step) / (10 + step))
                for old, new in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
                    if old.is_floating_point():  # weights, and running statistics if there are any
                        old.lerp_(new, 1 - decay)
            losses.append(loss.item())
            step += 1
        epoch = step / steps_per_epoch
        if progress >= 1 or time.time() - last_print > 150:
            last_print = time.time()
            a, b = features(average, train[::6]), features(average, test)
            ncm = nearest_class_mean(a, train_y[::6], b, test_y)
            print(
                f"epoch {epoch:5.1f}  {time.time() - start:5.0f} s  loss {sum(losses[-100:]) / len(losses[-100:]):.3f}  nearest class mean {ncm:.4f} (1/6 of train)",
                flush=True,
            )
            save(args, average, config, epoch, {"nearest_class_mean_interim": ncm})
    a, b = features(average, train), features(average, test)
    figures = {
        "nearest_class_mean": nearest_class_mean(a, train_y, b, test_y),
        "linear_probe": linear_probe(a, train_y, b, test_y),
        "seconds": round(time.time() - start),
    }
    pixels = [t.flatten(1).float() / 255 for t in (train, test)]
    figures["nearest_class_mean_raw_pixels"] = nearest_class_mean(pixels[0], train_y, pixels[1], test_y)
    print(json.dumps(figures), flush=True)
    save(args, average, config, step / steps_per_epoch, figures)


def save(args: argparse.Namespace, model: nn.Module, config: dict, epochs: float, figures: dict) -> None:
    recipe = {k: v for k, v in vars(args).items() if k not in ("out", "data")}
    metadata = {
        "architecture": json.dumps(config),
        "mean": json.dumps([fashion_mnist.MEAN]),
        "std": json.dumps([fashion_mnist.STD]),
        "recipe": json.dumps({**recipe, "epochs_run": round(epochs, 2)}),
        "figures": json.dumps(figures),
    }
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(state, args.out, metadata=metadata)


if __name__ == "__main__":
    main()
