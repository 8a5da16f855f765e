"""One mechanism for every decoder-only language model: the model's own forward, in pieces.

The forward of a decoder is a prologue, a row of layers, and an epilogue. A stage holds a slice of the row and runs the
*whole* forward that the authors wrote; what it does not hold is replaced, for the time of the forward, by stand-ins
that cost nothing, and the hidden state that arrives takes the place of the first held layer's argument::

                  ids -> embed -> masks, rotary -> 0  1  2 | 3  4  5 -> norm -> head -> logits
    stage 0       ids -> embed -> masks, rotary -> 0  1  2 + .  .  .    (the forward is left here)
    stage 1       ids -> .     -> masks, rotary -> .  .  . + 3  4  5 -> norm -> head -> logits
                                                           |
                                             argument of layer 3: all that is sent

So masks, positions, scales, windows by layer type, soft caps and the order of operations are the authors' own, bit by
bit, on every stage, and nothing about a family is written down here.

=======================  ==================================================================================
`twin.py`                the model's structure on the meta device, without its weights
`layout.py`              what is before, in and after the row
`find.py`                model -> layout
`dry_run.py`             one forward of the twin; `findings.py` says what follows from it
`cuts.py`                where to cut the row
`stand_in.py`            what takes the place of a layer or an embedding that is elsewhere
`part.py`                the modules of one stage
`stage_forward.py`       its forward
`cache.py`               key-value caches that know how long the other stages' layers are
`router.py`              the load-balancing loss of mixtures of experts, summed over stages
`materialize.py`         memory and first values for stages on the meta device
`filling.py`             or their weights, by transformers' own loader
`pretrained.py`          stages from Hugging Face directories; `weight_files.py` reads them lazily
`pretrained_saving.py`   and back
`needed_tensors.py`      which tensors of a checkpoint a stage would read; `safetensors_header.py` knows where they are
=======================  ==================================================================================

`split/causal_lm.py` is the door.
"""
