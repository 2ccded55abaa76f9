"""Published weights read into our parameters, and the model directory that people pass around."""
