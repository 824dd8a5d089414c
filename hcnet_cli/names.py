"""Names that the command line, the recipes and the code share. Plain data, so that `--help` is instant."""

ABLATION_LENGTH = {"pretrain/digits": 3}  # epochs of an ablation's runs, where the recipe's own would take too long
EMBEDDED = {  # the data set inside the program for each task
    "pretrain": "digits",
    "finetune-det": "digit-scenes",
    "finetune-seg": "digit-stuff",
}
PAPER = {"pretrain": "imagenet", "finetune-det": "coco-1x", "finetune-seg": "ade20k-160k"}  # recipe for other data
DATA_VARIABLE = {"pretrain": "HCNET_IMAGENET", "finetune-det": "HCNET_COCO", "finetune-seg": "HCNET_ADE20K"}
