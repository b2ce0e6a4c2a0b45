"""open_clip's training step, run by `peers` in a process of its own.

Takes the sizes as JSON. Says {"compiled", "parameters", "seconds"} when it is ready; then, for each
number of steps on a line, {"seconds": [...]}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP


class Step:
    """Model, loss and optimizer, on one random batch."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = torch.device(sizes["device"])
        sigmoid = sizes["loss"] == "sigmoid"
        self.model = CLIP(
            sizes["embed_dim"],
            sizes["vision_cfg"],
            sizes["text_cfg"],
            quick_gelu=sizes["quick_gelu"],
            init_logit_bias=-10.0 if sigmoid else None,
            output_dict=True,
        ).to(self.device)
        self.forward = self.model
        self._loss = SigLipLoss() if sigmoid else ClipLoss()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=sizes["learning_rate"],
            betas=tuple(sizes["betas"]),
            weight_decay=sizes["weight_decay"],
        )
        side, text = sizes["vision_cfg"]["image_size"], sizes["text_cfg"]
        self._images = torch.randn(sizes["batch_size"], 3, side, side, device=self.device)
        self._texts = torch.randint(
            1,
            text["vocab_size"],
            (sizes["batch_size"], text["context_length"]),
            device=self.device,
        )
        self._half = sizes["dtype"] == "bfloat16"

    def __call__(self) -> None:
        """Trains one step and waits for it."""
        self._optimizer.zero_grad(set_to_none=True)
        half = torch.autocast(self.device.type, torch.bfloat16)
        with half if self._half else contextlib.nullcontext():
            outputs = self.forward(self._images, self._texts)
            loss = self._loss(**outputs)
        loss.backward()
        self._optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compiled(step: Step) -> bool:
    """Whether torch.compile works here; the step is left eager where it does not."""
    try:
        step.forward = torch.compile(step.model)
        step()
    except Exception as error:  # whatever the compilers that it calls raise
        print(f"torch.compile does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
        step.forward = step.model
        return False
    return True


def main() -> None:
    """Serves until its input ends."""
    sizes = json.loads(sys.argv[1])
    torch.set_num_threads(sizes["threads"])
    start = time.perf_counter()
    step = Step(sizes)
    is_compiled = compiled(step)
    step()
    parameters = sum(parameter.numel() for parameter in step.model.parameters())
    seconds = time.perf_counter() - start
    say({"compiled": is_compiled, "parameters": parameters, "seconds": seconds})
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        say({"seconds": times})


def say(message: dict[str, Any]) -> None:
    """A line for the process that started this one."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
