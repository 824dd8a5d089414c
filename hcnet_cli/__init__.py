"""HcNet as one experiment: pretrain, fine-tune, ablate, report."""

__version__ = "0.1.0"
