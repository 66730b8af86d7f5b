"""EfficientNet-Lite as a `transformers` model: the vision tower of the shipped checkpoint."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

from .configuration_optsg import EfficientNetLiteConfig
from .layers import Float32Buffers


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's `SAME` padding, which the pretrained weights expect.

    With a stride of 2, it pads more on the right and at the bottom.
    """

    def forward(
        self, hidden_states: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pad and convolve `[batch, channels, height, width]`, with other weights if they are given."""
        totals = [
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, kernel, stride in zip(hidden_states.shape[2:], self.kernel_size, self.stride)
        ]
        weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
        padding = [total // 2 for total in totals]
        for index, total in enumerate(totals):
            # If one side needs one more pixel, the kernel gets a leading row or column of zeros. This is faster than
            # copying the feature map. onnxruntime would take `F.pad` of the weight for that of the feature map.
            if total % 2:
                weight = torch.cat([torch.zeros_like(weight.narrow(2 + index, 0, 1)), weight], dim=2 + index)
                padding[index] += 1
        return F.conv2d(hidden_states, weight, bias, self.stride, padding, self.dilation, self.groups)


class Float32BatchNorm(Float32Buffers, nn.BatchNorm2d):
    """Batch normalisation whose statistics keep 32 bits, computed in 32 bits."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise `[batch, channels, height, width]`."""
        if hidden_states.dtype == self.running_var.dtype == self.weight.dtype:
            return super().forward(hidden_states)
        normed = F.batch_norm(
            hidden_states.float(),
            self.running_mean,
            self.running_var,
            self.weight.float(),
            self.bias.float(),
            self.training,
            self.momentum,
            self.eps,
        )
        return normed.to(hidden_states.dtype)


class ConvNormAct(nn.Module):
    """Convolution, batch normalisation, and ReLU6 (optional).

    Batch normalisation with fixed statistics is folded into the convolution, so that it needs no pass over the feature
    map. Without gradients, the folded weights are remembered until one of the tensors changes.
    """

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)
        self.norm = Float32BatchNorm(out_channels, eps=config.batch_norm_eps)
        self.activation = nn.ReLU6(inplace=True) if activation else nn.Identity()
        # Set by `fold`. They move with the module, and are not saved.
        self.register_buffer("folded_weight", None, persistent=False)
        self.register_buffer("folded_bias", None, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `[batch, channels, height, width]`."""
        # An adapter around the convolution adds to its output, so it needs the layer itself. An offloaded layer has
        # its weights only while it is called.
        is_whole = type(self.conv) is SameConv2d and not (self.conv.weight.is_meta or self.norm.weight.is_meta)
        if self.norm.training or not is_whole:
            return self.activation(self.norm(self.conv(hidden_states)))
        is_folded = self.folded_weight is not None
        weight, bias = (self.folded_weight, self.folded_bias) if is_folded else self._folded()
        dtype = hidden_states.dtype
        return self.activation(self.conv(hidden_states, weight.to(dtype), bias.to(dtype)))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold batch normalisation into the convolution, until [`unfold`]. Later changes of weights are ignored."""
        if not self.conv.weight.is_meta and not self.norm.weight.is_meta:
            self.folded_weight, self.folded_bias = self._folded()

    def unfold(self) -> None:
        """Undo [`fold`]."""
        self.folded_weight = self.folded_bias = None

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of the convolution with batch normalisation."""
        # torch.nn.utils.fuse_conv_bn_weights would cut the gradients.
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class InvertedResidual(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = ConvNormAct(config, in_channels, width, 1) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNormAct(config, width, width, kernel_size, stride, groups=width)
        self.project = ConvNormAct(config, width, out_channels, 1, activation=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the block to `[batch, channels, height, width]`."""
        output = self.project(self.depthwise(self.expand(hidden_states)))
        return output + hidden_states if self.residual else output


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    """Base class of the two models: configuration and initial weights."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    # The tower has no attention, but a model with SDPA attention accepts only towers that have this flag.
    _supports_sdpa = True
    _no_split_modules = ["InvertedResidual", "ConvNormAct"]
    _keep_in_fp32_modules_strict = ["running_mean", "running_var"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """EfficientNet-Lite without its classifier.

    Batch normalisation also uses the pretrained statistics during training, because the batches are too small and too
    different from ImageNet to estimate new statistics.
    """

    # The checkpoint of a classifier loads without its classifier.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = ConvNormAct(config, 3, config.stem_size, 3, stride=2)
        blocks, channels, self.stage_ends = [], config.stem_size, set()
        for repeats, kernel_size, stride, expansion, out_channels in config.stages:
            for repeat in range(repeats):
                blocks.append(
                    InvertedResidual(
                        config, channels, out_channels, kernel_size, stride if repeat == 0 else 1, expansion
                    )
                )
                channels = out_channels
            self.stage_ends.add(len(blocks))
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNormAct(config, channels, config.hidden_size, 1)
        self.post_init()

    def train(self, mode: bool = True) -> "EfficientNetLiteModel":
        """Set the mode of all modules except batch normalisation, which stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Compute the features of images.

        Args:
            pixel_values: `[batch, 3, height, width]`.
            output_hidden_states: Whether to return the feature maps of all stages.
            kwargs: Ignored. Other towers have more arguments.

        Returns:
            `last_hidden_state` `[batch, hidden_size, height / 32, width / 32]`; `pooler_output`
            `[batch, hidden_size]`, its mean over height and width; and with `output_hidden_states` the feature maps
            `[batch, channels, height, width]` of the stem, of each stage, and of the last convolution.
        """
        # On CPUs, depthwise convolutions are about twice as fast in this memory format.
        hidden_states = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = [hidden_states]
        for index, block in enumerate(self.blocks, start=1):
            hidden_states = block(hidden_states)
            if index in self.stage_ends:
                maps.append(hidden_states)
        hidden_states = self.head(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean(dim=(-2, -1)),
            hidden_states=(*maps, hidden_states) if output_hidden_states else None,
        )


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrainedModel):
    """EfficientNet-Lite with its linear classifier, for `AutoModelForImageClassification`."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.efficientnet_lite = EfficientNetLiteModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutputWithNoAttention:
        """Compute `logits` `[batch, num_labels]` of images `[batch, 3, height, width]`."""
        outputs = self.efficientnet_lite(pixel_values, **kwargs, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutputWithNoAttention(logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["EfficientNetLiteForImageClassification", "EfficientNetLiteModel"]
