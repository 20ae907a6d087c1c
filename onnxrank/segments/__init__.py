"""A sequence that joins the user's history and the candidate, taken apart where its length is symbolic.

`[h_1, ..., h_L, c]`, a history with the candidate appended, has `L + 1` positions of which all but one are the same for
all candidates. Where L is a number, index maps tell the positions apart; where it is not, no index map can be written.
Then the graph is rewritten before anything else looks at it: what an operator does along the axis is done segment by
segment, `f(a ++ b) = f(a) ++ f(b)` for whatever treats positions independently, `(a ++ b) (c ++ d) = a c + b d` for
products that contract the axis, and `softmax(a ++ hidden) = softmax(a) ++ 0` where a mask is proved to hide a segment.
What comes out is a graph of ordinary operators in which every tensor has one level, and all rules apply as ever.
Neighbours that are the same for all candidates, a history, a separator and tokens of the user, are one segment.

`spans` proves masks, `division` holds tensors in segments, `steps` is the table of what operators do to those, and
`walk` goes over a graph.
"""

from onnxrank.segments.walk import divided, sequences

__all__ = ["divided", "sequences"]
