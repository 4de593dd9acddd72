"""The CLIP that benchmarks/step.py is compared with: the same model and training step in PyTorch.

A vision transformer and a text transformer in plain torch, `scaled_dot_product_attention`,
`torch.compile`, fused AdamW; bfloat16 under autocast, or float32. Parameter names are OpenAI's, so
that a state dict of `declip_jax.interop.openai` loads as it is.

step.py starts this file as a process of its own, so that neither framework's memory pool or threads
stand in the other's way, and asks it for rounds in turn with its own: a line with a number of steps
on the standard input is answered by a line of JSON on the standard output.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, T, w/H]
        x = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, causal: bool):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, causal) for _ in range(layers))

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, resolution, patch, width, layers, heads, embed_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        cells = (resolution // patch) ** 2
        self.positional_embedding = nn.Parameter(torch.empty(cells + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, N, width]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(nn.Module):
    """uint8 images [B, H, W, 3] and tokens [B, L] -> the contrastive loss, a scalar."""

    def __init__(self, spec: dict):
        super().__init__()
        text, embed_dim = spec["text"], spec["embed_dim"]
        self.eot_id = text["eot_id"]
        self.visual = VisionTransformer(**spec["image"], embed_dim=embed_dim)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.empty(text["context"], text["width"]))
        self.transformer = Transformer(text["width"], text["layers"], text["heads"], causal=True)
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.empty(text["width"], embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(spec[name]), persistent=False)

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))  # [B, L, width]
        end = (tokens == self.eot_id).int().argmax(dim=1)
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def forward(self, images, tokens):
        images = (images.float() / 255 - self.mean) / self.std
        image = F.normalize(self.visual(images.permute(0, 3, 1, 2)).float(), dim=-1)
        text = F.normalize(self.encode_text(tokens).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.logit_scale.exp() * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Step:
    """A compiled training step on one batch: AdamW, and the clamp of the logit scale."""

    def __init__(self, spec: dict, inputs, device: torch.device):
        self.model = Clip(spec)
        names = [name for name in inputs.files if name.startswith("param/")]
        parameters = {name.removeprefix("param/"): torch.from_numpy(inputs[name]) for name in names}
        self.model.load_state_dict(parameters)
        self.model.to(device)
        self.batch = (
            torch.from_numpy(inputs["image"]).to(device),
            torch.from_numpy(inputs["tokens"]).long().to(device),
        )
        self.limits = spec["logit_scale_range"]
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"
        )
        self.loss = torch.compile(self.model)
        decays = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            norm = ".ln_" in f".{name}" or name == "logit_scale"
            decays[not (norm or name.endswith("bias"))].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decays[True], "weight_decay": spec["weight_decay"]},
                {"params": decays[False], "weight_decay": 0.0},
            ],
            lr=spec["lr"],
            betas=spec["betas"],
            eps=spec["eps"],
            fused=True,
        )

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = self.loss(*self.batch)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(*self.limits)
        return loss.detach()


def main() -> None:
    """Reads the file that step.py wrote, answers with the first losses, then serves rounds."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with np.load(sys.argv[1]) as inputs:
        spec = json.loads(bytes(inputs["spec"]))
        step = Step(spec, inputs, device)

    start = time.perf_counter()
    losses = [step().item()]
    compile_seconds = time.perf_counter() - start
    squares = [p.grad.square().sum() for p in step.model.parameters()]
    grad_norm = torch.stack(squares).sum().sqrt().item()
    losses += [step().item() for _ in range(spec["check_steps"])]
    answer = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "compile_seconds": round(compile_seconds, 1),
        "losses": losses,
        "grad_norm": grad_norm,
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        steps = int(line)
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        loss.item()  # waits for the device
        seconds = (time.perf_counter() - start) / steps
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
        print(json.dumps({"seconds": seconds, "peak_gib": peak}), flush=True)


if __name__ == "__main__":
    main()
