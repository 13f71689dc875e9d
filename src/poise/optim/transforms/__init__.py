"""The pieces that rules are chained from: momentum, adaptive scaling, signs, orthogonalization, projections, curvature."""
