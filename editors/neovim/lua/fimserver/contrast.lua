--- Computes colors with a wanted contrast, as WCAG 2 defines it. Pure functions; a color is 0xRRGGBB.
---
---   ratio    the contrast of two colors, from 1 to 21
---   toward   the first color on the way from one to another that has a wanted contrast with the background
---
--- Knows:  numbers.  Never: highlight groups.
local M = {}

local STEPS = 64

---@param color integer
---@return number red
---@return number green
---@return number blue
local function split(color)
  return math.floor(color / 0x10000) % 0x100, math.floor(color / 0x100) % 0x100, color % 0x100
end

---@param channel number From 0 to 255.
local function linear(channel)
  channel = channel / 255
  return channel <= 0.04045 and channel / 12.92 or ((channel + 0.055) / 1.055) ^ 2.4
end

---@param color integer
local function luminance(color)
  local red, green, blue = split(color)
  return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
end

--- Return the contrast of two colors.
---@param one integer
---@param other integer
---@return number
function M.ratio(one, other)
  local a, b = luminance(one), luminance(other)
  return (math.max(a, b) + 0.05) / (math.min(a, b) + 0.05)
end

---@param from integer
---@param to integer
---@param share number From 0 to 1.
local function mix(from, to, share)
  local mixed = 0
  local a, b = { split(from) }, { split(to) }
  for i = 1, 3 do
    mixed = mixed * 0x100 + math.floor(a[i] + (b[i] - a[i]) * share + 0.5)
  end
  return mixed
end

--- Return the first color on the way from `from` to `to` that fits; `to` if none does.
---@param from integer
---@param to integer
---@param fits fun(color: integer): boolean
---@return integer
function M.toward(from, to, fits)
  for step = 0, STEPS do
    local color = mix(from, to, step / STEPS)
    if fits(color) then
      return color
    end
  end
  return to
end

return M
