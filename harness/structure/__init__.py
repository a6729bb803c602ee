"""What a decoder consists of, derived from one recorded forward and from no module's name.

tape       a forward as a straight line of calls, recorded and run again
graph      which values of a tape come from which
norms      what kind of norm a module is, found by trying it
residual   who writes and reads the residual stream, and what rotations it bears
sites      what matrix products read, and what that comes from
naming     what sites are called
derive     the tape of a model -> its Structure, with the reason of each refusal
structure  the words: Matrix, Norm, Feed, Site, Residual, Structure
skeleton   a model without weights, from its config alone
table      a Structure for a person: python -m harness.structure MODEL
"""
