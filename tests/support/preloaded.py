"""What the programs of the project import, imported: tests/support/warm.py forks processes that have done so."""

# ruff: noqa: F401
import torch.distributed.launcher
from torch.utils.tensorboard import SummaryWriter

import megatron_ext.checkpoint.decoder
import megatron_ext.data
import megatron_ext.model
import megatron_ext.objectives
import megatron_ext.observe
import megatron_ext.optim
import megatron_ext.plan.report
import megatron_ext.resilience.notice
import megatron_ext.runtime.faults
import megatron_ext.train.verify
import megatron_ext.vocab
import pretrain_emu3
import tests.support.distributed
import tests.support.programs
import tokenizer_train.text.train
import tokenizer_train.vision.train
import tools.verify_layout
