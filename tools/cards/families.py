"""Facts about the families of models, for cards and tables: one entry a file in ``zoo.backbones``.

Every fact stands in the paper or in the authors' repository; what neither of them states is left empty. Top-1
accuracies are not here but with the models, in their configs and functions; timm has no place for top-5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: Name as the authors write it.
        title: Title of the paper.
        authors: Its authors as BibTeX writes them; empty if unknown.
        arxiv: Its number on arXiv.
        repository: Address of the authors' code.
        code_licence: Licence of that code, in words; empty if none is stated.
        description: What the models are, in a paragraph.
        venue: Where the paper was published, if it is known.
        top5: Published top-5 accuracies in percent, by model.
    """

    name: str
    title: str
    authors: str
    arxiv: str
    repository: str
    code_licence: str
    description: str
    venue: str = ""
    top5: Mapping[str, float] = field(default_factory=dict)

    @property
    def year(self) -> int:
        """Year of the first version on arXiv."""
        return 2000 + int(self.arxiv[:2])

    @property
    def paper(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


LOCAL_MAMBA = dict(
    title="LocalMamba: Visual State Space Model with Windowed Selective Scan",
    authors="Huang, Tao and Pei, Xiaohuan and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang",
    arxiv="2403.09338",
    repository="https://github.com/hunto/LocalMamba",
    code_licence="Apache-2.0",
)

FAMILIES = {
    "a2mamba": Family(
        name="A2Mamba",
        title="A2Mamba: Attention-augmented State Space Models for Visual Recognition",
        authors="Lou, Meng and Fu, Yunxiang and Yu, Yizhou",
        arxiv="2507.16624",
        repository="https://github.com/LMMMEng/A2Mamba",
        code_licence="",
        description=(
            "A2Mamba is a pyramid of four stages that makes attention and a state-space model share their work. "
            "Half of a block's heads attend to the window around every cell, the other half to a window of as many "
            "cells spread over a larger part of the map. The result is scanned once, row by row, and the two sets "
            "of attention maps are then used a second time: they gather the hidden states of the scan, so that what "
            "was read in one direction is mixed in two dimensions. The last stage attends to all cells and does not "
            "scan. Depthwise convolutions around the mixers carry positions."
        ),
    ),
    "adventurer": Family(
        name="Adventurer",
        title="Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency",
        authors=(
            "Wang, Feng and Yang, Timing and Yu, Yaodong and Ren, Sucheng and Wei, Guoyizhe and Wang, Angtian and "
            "Shao, Wei and Zhou, Yuyin and Yuille, Alan and Xie, Cihang"
        ),
        arxiv="2410.07599",
        repository="https://github.com/wangf3014/Adventurer",
        code_licence="",
        venue="CVPR 2025",
        description=(
            "Adventurer reads an image as a language model reads text: once per block and in one direction, with "
            "the matrix form of Mamba-2. Two devices make up for that. Every block starts from the mean of all "
            "tokens, so that the first patches know of the whole image too, and some blocks read the patches in "
            "reverse. The class token comes last, where it has seen everything. A gated MLP follows every mixer."
        ),
    ),
    "efficient_vmamba": Family(
        name="EfficientVMamba",
        title="EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        authors="Pei, Xiaohuan and Huang, Tao and Xu, Chang",
        arxiv="2403.09977",
        repository="https://github.com/TerryPei/EfficientVMamba",
        code_licence="Apache-2.0, as its README says; there is no licence file",
        description=(
            "EfficientVMamba is made for small budgets. In the first two of its four stages, four scans share the "
            "map among them: each reads every second cell of every second row or column, so that a cell is read "
            "once and not four times. A depthwise convolution works beside the scans and brings neighbours together "
            "again, and one squeeze-and-excitation weighs the channels of both. The last two stages, whose maps are "
            "small, are inverted residuals as in MobileNetV2 and do not scan."
        ),
    ),
    "lbvim": Family(
        name="LBVim",
        title="LBMamba: Locally Bi-directional Mamba",
        authors="Zhang, Jingwei and Han, Xi and Qin, Hong and Hosseini, Mahdi S and Samaras, Dimitris",
        arxiv="2506.15976",
        repository="https://github.com/cvlab-stonybrook/LBMamba",
        code_licence="",
        venue="TMLR",
        description=(
            "LBVim is a Vim that scans once per block instead of twice. Its scan runs forwards over all tokens and, "
            "within windows of a few tokens, backwards as well, with the same parameters; every second block reads "
            "the sequence from its end, so that two blocks together have seen everything from both sides. There is "
            "no class token: the classifier reads the mean of all tokens, or in the largest model what an attention "
            "pool makes of them."
        ),
    ),
    "local_vim": Family(
        name="LocalVim",
        **LOCAL_MAMBA,
        description=(
            "LocalVim is a Vim whose blocks read the tokens along four orders out of rows, columns and small "
            "windows, each forwards and backwards: windows keep patches together in the sequence that are "
            "neighbours in the image. The authors searched for the best four of every block. Each order has its own "
            "convolution and state-space model; a channel attention weighs their outputs before they are added."
        ),
    ),
    "local_vmamba": Family(
        name="LocalVMamba",
        **LOCAL_MAMBA,
        description=(
            "LocalVMamba is a first-generation VMamba, a pyramid of four stages whose blocks have no MLP, that "
            "reads its maps along other orders: four in every block out of rows, columns and small windows, each "
            "forwards and backwards. Windows keep cells together in the sequence that are neighbours in the image. "
            "The authors searched for the best four of every block. A channel attention weighs the outputs of the "
            "scans before they are added."
        ),
    ),
    "mamba_vision": Family(
        name="MambaVision",
        title="MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        authors="Hatamizadeh, Ali and Kautz, Jan",
        arxiv="2407.08083",
        repository="https://github.com/NVlabs/MambaVision",
        code_licence="NVIDIA Source Code License-NC: research and evaluation only",
        description=(
            "MambaVision puts three kinds of layers where each of them pays. Its first two stages are residual "
            "convolutions. The last two cut their maps into windows, at the training size a single one, and let "
            "state-space mixers work in the first half of the blocks and attention in the rest. In a mixer, half of "
            "the channels pass a convolution that looks both ways and one forward scan, the other half a "
            "convolution only; both are joined instead of one gating the other."
        ),
        top5={
            "mamba_vision_t": 96.2,
            "mamba_vision_t2": 96.3,
            "mamba_vision_s": 96.5,
            "mamba_vision_b": 96.9,
            "mamba_vision_l": 97.1,
            "mamba_vision_l2": 97.2,
            "mamba_vision_b_21k": 97.5,
            "mamba_vision_l_21k": 97.9,
            "mamba_vision_l2_512_21k": 98.4,
            "mamba_vision_l3_256_21k": 98.3,
            "mamba_vision_l3_512_21k": 98.6,
        },
    ),
    "plain_mamba": Family(
        name="PlainMamba",
        title="PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        authors=(
            "Yang, Chenhongyi and Chen, Zehui and Espinosa, Miguel and Ericsson, Linus and Wang, Zhenyu and Liu, "
            "Jiaming and Crowley, Elliot J."
        ),
        arxiv="2403.17695",
        repository="https://github.com/ChenhongyiYang/PlainMamba",
        code_licence="Apache-2.0",
        venue="BMVC 2024",
        description=(
            "PlainMamba keeps one resolution and one width from a convolutional stem to the classifier, and has no "
            "class token. Every block reads the map along four snakes, by rows and by columns from either end, "
            "whose steps always lead to a neighbouring cell. The scans share all their parameters; a learned vector "
            "for the direction of each step, added to the input matrix, tells them where they are going."
        ),
        top5={"plainmamba_l1": 94.0, "plainmamba_l2": 95.6, "plainmamba_l3": 95.9},
    ),
    "shuffle_mamba": Family(
        name="ShuffleMamba",
        title="Stochastic Layer-Wise Shuffle for Improving Vision Mamba Training",
        authors=(
            "Huang, Zizheng and Chen, Haoxing and Li, Jiaqi and Lan, Jun and Zhu, Huijia and Wang, Weiqiang and "
            "Wang, Limin"
        ),
        arxiv="2408.17081",
        repository="https://github.com/huangzizheng01/ShuffleMamba",
        code_licence="",
        venue="ICML 2025",
        description=(
            "ShuffleMamba is a way to train a bidirectional Vim. During training a block may read its tokens in a "
            "random order, which is undone right after it; the deeper the block, the likelier. So the model learns "
            "not to rely on the order of the sequence. Nothing is shuffled after training, and nothing is added to "
            "the model. Models with `reg` in their names have register tokens spread over the sequence, all of "
            "which the classifier reads, instead of one class token before the patches."
        ),
    ),
    "vim": Family(
        name="Vim",
        title="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        authors="Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang",
        arxiv="2401.09417",
        repository="https://github.com/hustvl/Vim",
        code_licence="Apache-2.0",
        venue="ICML 2024",
        description=(
            "Vim has the plan of a plain vision transformer with selective state-space models in the place of "
            "attention, so that its cost grows in proportion to the number of patches. An image is cut into patches "
            "with learned position embeddings. Every block scans the sequence from both ends, with parameters of "
            "its own for either direction; the outputs are gated, averaged and added to the residual stream. In the "
            "authors' models the classifier reads a class token that stands in the middle of the sequence."
        ),
        top5={
            "vim_tiny_patch16_224": 93.0,
            "vim_tiny_patch16_stride8_224": 94.2,
            "vim_small_patch16_224": 95.1,
            "vim_small_patch16_stride8_224": 95.4,
            "vim_base_patch16_224": 95.8,
        },
    ),
    "vmamba": Family(
        name="VMamba",
        title="VMamba: Visual State Space Model",
        authors=(
            "Liu, Yue and Tian, Yunjie and Zhao, Yuzhong and Yu, Hongtian and Xie, Lingxi and Wang, Yaowei and Ye, "
            "Qixiang and Liu, Yunfan"
        ),
        arxiv="2401.10166",
        repository="https://github.com/MzeroMiko/VMamba",
        code_licence="MIT",
        description=(
            "VMamba is a pyramid of four stages whose blocks scan a map four times: by rows and by columns, each "
            "from either end. The four outputs of a cell are added, so that every cell hears from all others. "
            "Models of the first generation (`vanilla`) have 16 states per channel, a gate and no MLP. Those of the "
            "second have one state, no gate and an MLP in each block; `s1l8` in a name stands for an inner width of "
            "1 times the block's and 8 blocks in the third stage."
        ),
    ),
}
