"""Run by torchrun from test_gpu_numbers.py: DATA FILE. Three steps of two processes that share a device.

nccl refuses two processes on one GPU, so gloo exchanges the gradients. The main process writes the weights to FILE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from gpu_support import DEVICE, batches_of, make_job, make_stepper
from safetensors.torch import save_file

if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False
    torch.distributed.init_process_group("gloo")
    device = torch.device("cuda", 0) if DEVICE.type == "cuda" else DEVICE
    job = make_job(data, device)
    stepper = make_stepper(job)
    for step, batch in enumerate(batches_of(job, 3)):
        stepper.step(step, [batch])
    if os.environ["RANK"] == "0":
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in job.task.model.state_dict().items()}, out
        )
    torch.distributed.destroy_process_group()
