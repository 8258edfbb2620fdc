"""HSTU attention on ragged batches, forward and backward: bucketed against plain padding (and on a GPU the Triton
kernel against the padded reference).

    python benchmarks/attention.py [--quick] [--check] [--json FILE] [--device cuda] [--bf16] [--peak-tflops TFLOPS]
                                   [--dim 64] [--heads 2] [--layers 2] [--longest 200,400] [--sequences N]

On a GPU memory is the peak of a step. TFLOP/s are those of the products that count: of pairs of a query and a key not
after it, two forward and four backward; with the device's peak (``--peak-tflops``) also their share of it, the MFU.

Aim: at least 2.5x at 50 % fill on CPU.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from model_cases import SavedBytes, add_size_arguments, arguments, finish, side_by_side, table, times_faster
from model_flops import attention_flops

from roo_ray.allocator import keep_freed_memory
from roo_ray.models import attention, attention_layout

AIM = 2.5


def case(rows: int, longest: int, fill: float, options: Any) -> dict[str, Any]:
    """Lengths evenly spread around ``fill`` of the longest, and the layers' inputs."""
    device, kind = options.device, torch.bfloat16 if options.bf16 else torch.float32
    generator = torch.Generator().manual_seed(0)
    low = max(0, round((2 * fill - 1) * longest))
    high = longest if low else round(2 * fill * longest)
    lengths = torch.linspace(low, high, rows).round().long()[torch.randperm(rows, generator=generator)]
    lengths[lengths.argmax()] = longest
    total = int(lengths.sum())
    ages = torch.cat([10 + 60.0 * torch.arange(int(n), 0, -1) for n in lengths])
    inputs = [torch.randn(total, 3 * options.dim, generator=generator) for _ in range(options.layers)]
    return {
        "fill": total / (rows * longest),
        "lengths": lengths.to(device),
        "ages": ages.float().to(device),
        "qkv": [x.to(device, kind).requires_grad_() for x in inputs],
        "position": (0.02 * torch.randn(longest, generator=generator)).to(device).requires_grad_(),
        "time": (0.02 * torch.randn(attention_layout.TIME_BUCKETS, generator=generator)).to(device).requires_grad_(),
        "longest": longest,
        "heads": options.heads,
    }


def forward(function: Any, layout: attention_layout.Layout, qkv: torch.Tensor, of: dict[str, Any]) -> torch.Tensor:
    """One layer; of bfloat16 inputs under autocast, as in a training."""
    with torch.autocast(qkv.device.type, torch.bfloat16, enabled=qkv.dtype == torch.bfloat16):
        out: torch.Tensor = function(qkv, layout, of["heads"], of["longest"], of["position"], of["time"])
    return out


def step(function: Any, buckets: int | None, of: dict[str, Any]) -> torch.Tensor:
    """One batch: its layout, then each layer forward and backward."""
    layout = attention_layout.layout(of["lengths"], of["ages"], buckets)
    outs = [forward(function, layout, qkv, of) for qkv in of["qkv"]]
    total = torch.stack([out.float().square().sum() for out in outs]).sum()
    torch.autograd.grad(total, [*of["qkv"], of["position"], of["time"]])
    return total


def saved(function: Any, buckets: int | None, of: dict[str, Any]) -> int:
    """Bytes kept for backward by one layer; on a GPU the peak of a step."""
    if of["lengths"].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(function, buckets, of)
        return int(torch.cuda.max_memory_allocated())
    layout = attention_layout.layout(of["lengths"], of["ages"], buckets)
    with SavedBytes() as kept:
        forward(function, layout, of["qkv"][0], of)
    return kept.total


def main() -> None:
    """Runs the cases."""
    parser = arguments("HSTU attention on ragged batches against plain padding")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="queries, keys and values in bfloat16")
    parser.add_argument("--longest", help="default 50,100,200,400; on a GPU also 1000,4000")
    parser.add_argument("--sequences", type=int, help="default: as many as have 12,800 slots, on a GPU 51,200")
    add_size_arguments(parser)
    options = parser.parse_args()
    if options.dim % options.heads:
        parser.error(f"--dim {options.dim} is no multiple of --heads {options.heads}: change one of them")
    torch.set_num_threads(1)
    keep_freed_memory()
    device = options.device
    longest = [200] if options.quick else [50, 100, 200, 400]
    fills = [0.5] if options.quick else [0.3, 0.5, 0.8]
    if device != "cpu":
        longest += [1000, 4000]
    if options.longest:
        longest = [int(x) for x in options.longest.split(",")]
    rows, missed = [], []
    for length in longest:
        for fill in fills:
            count = options.sequences or max(8, (64 if device == "cpu" else 256) * 200 // length)
            of = case(count, length, fill, options)
            ways = {
                "padded": lambda of=of: step(attention.padded_attention, 1, of),
                "ours": lambda of=of: step(attention.attention, None, of),
            }
            values = [way() for way in ways.values()]
            close = 0.05 if options.bf16 else 1e-3
            torch.testing.assert_close(values[0], values[1], rtol=close, atol=close)
            seconds = side_by_side(ways, 3 if options.quick else 7, device)
            kept = {
                "padded": saved(attention.padded_attention, 1, of),
                "ours": saved(attention.attention, None, of),
            }
            speed = times_faster(seconds, "padded", "ours")
            memory = kept["padded"] / kept["ours"]
            flop = options.layers * attention_flops(of["lengths"], options.dim)
            rows.append(
                {
                    "history": length,
                    "fill": of["fill"],
                    "sequences": count,
                    "padded_ms": 1e3 * statistics.median(seconds["padded"]),
                    "ours_ms": 1e3 * statistics.median(seconds["ours"]),
                    "speedup": speed,
                    "saved_memory": memory,
                    "ours_tflops": flop / statistics.median(seconds["ours"]) / 1e12,
                }
            )
            if device == "cpu" and fill == 0.5 and speed < AIM:
                missed.append(f"history {length} at {of['fill']:.0%} fill: {speed:.2f}x, aim {AIM}x")
    header = ["history", "fill", "sequences", "padded ms", "ours ms", "speed-up"]
    header += ["memory kept for backward" if device == "cpu" else "peak memory", "TFLOP/s", "MFU"]
    print(
        table(
            header,
            [
                [
                    r["history"],
                    f"{r['fill']:.0%}",
                    r["sequences"],
                    f"{r['padded_ms']:.1f}",
                    f"{r['ours_ms']:.1f}",
                    f"{r['speedup']:.2f}x",
                    f"{r['saved_memory']:.1f}x less",
                    f"{r['ours_tflops']:.3f}",
                    f"{r['ours_tflops'] / options.peak_tflops:.1%}" if options.peak_tflops else "",
                ]
                for r in rows
            ],
        )
    )
    finish(rows, missed, options)


if __name__ == "__main__":
    main()
