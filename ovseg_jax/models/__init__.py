"""The networks, as pure Linen modules. Nothing here knows a loss."""
