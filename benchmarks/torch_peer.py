"""The CLIP that benchmarks/step.py is compared with: the same model and training step in PyTorch.

A vision transformer and a text transformer in plain torch, `scaled_dot_product_attention`,
`torch.compile`, fused AdamW; on a GPU bfloat16 autocast, on a CPU float32. Parameter names are those
of the published DeCLIP code, so a state dict of `declip_jax.interop.declip` loads as it is.

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


class TextTransformer(nn.Module):
    def __init__(self, vocab_size, context, width, layers, heads, embed_dim, proj_bias, eot_id):
        super().__init__()
        self.eot_id = eot_id
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.transformer = Transformer(width, layers, heads, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim, bias=proj_bias)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        end = (tokens == self.eot_id).int().argmax(dim=1)
        return self.text_projection(x[torch.arange(len(x), device=x.device), end])


class Clip(nn.Module):
    """uint8 images [B, H, W, 3] and tokens [B, L] -> the contrastive loss, a scalar."""

    def __init__(self, image: dict, text: dict, embed_dim: int, mean, std):
        super().__init__()
        self.visual = VisionTransformer(**image, embed_dim=embed_dim)
        self.encode_text = TextTransformer(**text, embed_dim=embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images, tokens):
        images = (images.float() / 255 - self.mean) / self.std
        image = F.normalize(self.visual(images.permute(0, 3, 1, 2)).float(), dim=-1)
        text = F.normalize(self.encode_text(tokens).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.logit_scale.exp() * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Step:
    """A compiled training step: AdamW, the clamp of the logit scale."""

    def __init__(self, model: Clip, images, tokens, optim: dict, limits, dtype: str):
        self.batch, self.limits = (images, tokens), limits
        self.model = model
        self.device = images.device
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        self.loss = torch.compile(model)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": optim.pop("weight_decay")},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **optim)

    def __call__(self) -> torch.Tensor:
        with self.autocast:
            loss = self.loss(*self.batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(*self.limits)
        return loss.detach()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Reads the folder named on the command line, reports the first losses, then serves rounds."""
    inputs = np.load(sys.argv[1])
    spec = json.loads(bytes(inputs["spec"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Clip(spec["image"], spec["text"], spec["embed_dim"], spec["mean"], spec["std"])
    parameters = {
        name.removeprefix("param/"): torch.from_numpy(inputs[name])
        for name in inputs.files
        if name.startswith("param/")
    }
    model.load_state_dict(parameters)
    model.to(device)
    images = torch.from_numpy(inputs["images"]).to(device)
    tokens = torch.from_numpy(inputs["tokens"]).long().to(device)
    step = Step(model, images, tokens, spec["optim"], spec["limits"], spec["dtype"])

    start = time.perf_counter()
    losses = [step().item()]
    compile_seconds = time.perf_counter() - start
    squares = [p.grad.square().sum() for p in model.parameters()]
    grad_norm = torch.stack(squares).sum().sqrt().item()
    losses += [step().item() for _ in range(spec["check_steps"] - 1)]
    reply = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "losses": losses,
        "grad_norm": grad_norm,
        "compile_seconds": compile_seconds,
    }
    print(json.dumps(reply), flush=True)
    for line in sys.stdin:
        step.synchronise()
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        step.synchronise()
        seconds = (time.perf_counter() - start) / int(line)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
