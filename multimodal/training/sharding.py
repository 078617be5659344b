"""A frozen decoder shared out between processes (FSDP2), where it does not fit on one GPU beside its activations.

Each holds a part of every layer, and fetches the others' when the layer's turn comes, forward and backward. Of the
decoder only the layers are shared out, which are most of it; what is trained is small, and stays whole on every
process, as DDP has it.

Source of the method: Y. Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", VLDB 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.training.processes import device, world_size


def shard_decoder(model: FusionForConditionalGeneration) -> None:
    """Leave this process its part of each of the decoder's layers, on the device where it computes.

    All processes have to do so, and to run the model together from then on.

    Raises:
        ValueError: If there is one process alone, or the decoder is trained, or would be saved with what is.
    """
    decoder: Any = model.model.language_model
    if world_size() == 1:
        raise ValueError("shard_decoder shares a decoder out between processes: start several with torchrun")
    if any(parameter.requires_grad for parameter in decoder.parameters()):
        raise ValueError("shard_decoder is for a frozen decoder: neither train it nor give it LoRA")
    if model.config.text_base is None or model.config.trainable_decoder:
        raise ValueError("shard_decoder is for a decoder that is named in a checkpoint, not copied into it")
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if not distributed.is_initialized():
        distributed.init_process_group()
    mesh = init_device_mesh(device().type, (world_size(),))
    for layer in decoder.layers:  # one after another: of the others, a GPU needs no room for the whole
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # DDP makes all weights those of the first process when it begins; these are to differ.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = [names[id(parameter)] for parameter in decoder.layers.parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)
