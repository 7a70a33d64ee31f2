"""Weights of other implementations, in and out; and of plain models, into looped ones.

    model, params = loopformer.convert.from_official('loopformer', 'ckpt.pt', heads=32)
    loopformer.logits(model, params, tokens, steps=4)

    model, params, tokenizer = loopformer.convert.from_pretrained('SmolLM2-135M')    # a folder, or a .gguf file
    loopformer.convert.export(model, params, tokenizer, 'out')                       # for transformers
"""
from loopformer.convert.export import export
from loopformer.convert.official import from_official, to_official
from loopformer.convert.pretrained import from_pretrained
from loopformer.convert.relaxed import relaxed
from loopformer.convert.retrofit import retrofit

__all__ = ['export', 'from_official', 'from_pretrained', 'relaxed', 'retrofit', 'to_official']
