--- Layers. `nn.Linear(in, out, bias)`, `nn.module { … forward = function(self, x, pass) … end }`, `nn.list(count, build)`. A module that ends in
-- a Linear may have `ending` and `inner` instead of `forward`: see Module:added_to.
-- @module wane.nn
local module = require "wane.nn.module"
local layers = require "wane.nn.layers"

return {
  module = module.module,
  list = module.list,
  is_module = module.is,
  Linear = require("wane.nn.linear").new,
  Embedding = layers.Embedding.new,
  PositionEmbedding = layers.PositionEmbedding.new,
  RMSNorm = layers.RMSNorm.new,
  LayerNorm = layers.LayerNorm.new,
  activation = layers.activation,
  gate = layers.gate,
  mixture = require("wane.nn.mixture").new,
  rotary = require("wane.nn.rotary").new,
  RelativeBias = require("wane.nn.relative").new,
  alibi = require("wane.nn.alibi").new,
  decoder = require "wane.nn.decoder",
  functional = require "wane.nn.functional",
}
