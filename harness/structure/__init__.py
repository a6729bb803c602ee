"""What a decoder consists of, derived from one recorded forward and from no module's name.

tape       a forward as a straight line of calls, recorded and run again
graph      which values of a tape come from which
norms      what kind of norm a module is, found by trying it
derive     the tape of a model -> its Structure, with the reason of each refusal
structure  the words: Matrix, Norm, Feed, Site, Residual, Structure
naming     what sites are called
skeleton   a model without weights, from its config alone
"""
