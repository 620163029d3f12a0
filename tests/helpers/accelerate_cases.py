"""The ways in which accelerate places a model."""

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

CPU = torch.device("cpu")


def dispatched(model, folder):
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def on_the_host(model, folder):
    return cpu_offload(model, execution_device=CPU)


def on_disk(model, folder):
    return disk_offload(model, str(folder), execution_device=CPU)
