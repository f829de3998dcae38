"""Where processes of tests come from: a server that has imported everything, from which they are forked at no cost.

Such a process has the environment that the server was started with, which may be that of any test.
"""

import multiprocessing
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "datasets",
        "inrank_dist.commands.train",
        "inrank_dist.train.loop",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
        "deepspeed",
        "faults",
        "runs",
    ]
)


def set_environment(environment: dict[str, str]) -> None:
    """Replace all environment variables of this process, with those of the test that needs it."""
    os.environ.clear()
    os.environ.update(environment)
