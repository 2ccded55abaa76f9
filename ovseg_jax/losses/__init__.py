"""The training objective (Sec. 3.2). Nothing here knows a model.

Losses return one value per example; weights and means are applied in `objective`. (A metric,
`false_negative_rate`, is a mean.)
"""
