"""Checkpoint in, checkpoint out: a trained Mixture-of-Experts model in another form.

``to_dcca`` replaces the MoE blocks of a Mixtral- or OLMoE-type checkpoint by DCCA blocks (descend, communicate,
communicate, ascend), fitted on a calibration text. It reads one decoder layer at a time, so the whole model is never in
memory, and writes a folder that ``AutoModelForCausalLM.from_pretrained`` opens.

``fold`` multiplies the forward multipliers of a µP model, or of any with some, into its weights, and writes a stock Mixtral
or OLMoE checkpoint with equal logits, which opens without this package.

``upcycle`` makes a dense Llama, Mistral, Granite or Qwen3 checkpoint a Mixture-of-Experts one that starts with the same logits: one
shared base and a light delta per expert (DeRS), or full copies in a stock Mixtral or Qwen3-MoE checkpoint.

``export`` writes a model of the former kind, trained or not, with ordinary experts: a stock checkpoint again.

``compress`` stores the experts of a MoE that was upcycled from a dense model as one shared base and a light delta each.
"""

# Here and now, not on first use: a module of the same name, imported by itself, would otherwise stand in its place.
from hf_moe_ext.convert.compress import compress
from hf_moe_ext.convert.distillation import DistillationSettings
from hf_moe_ext.convert.export import export
from hf_moe_ext.convert.fold import fold
from hf_moe_ext.convert.to_dcca import to_dcca
from hf_moe_ext.convert.upcycle import upcycle

__all__ = ["DistillationSettings", "compress", "export", "fold", "to_dcca", "upcycle"]
