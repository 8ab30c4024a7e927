// The surface of a small map at a level, by rays: for each pixel the first place along the line of sight at which the map
// rises above the level, shaded by the map's gradient there. Blocks of voxels that are all below are stepped over.

const BLOCK = 4
const MARGIN = 3 // voxels around the map
const STEP = 0.6 // voxels
const FINE_PIXELS = 360 // along the longer side of the picture
const COARSE_PIXELS = 150 // while it is turned
const COLOUR = [0.90, 0.62, 0.0]

export function render({model}) {
  const root = document.createElement("div")
  root.className = "surface"
  root.innerHTML = `<canvas tabindex="0" role="application"></canvas><div class="note" role="status"></div>`
  const [canvas, note] = root.children
  canvas.setAttribute("aria-label", "surface; drag or arrows turn it, wheel, plus and minus zoom, 0 shows all of it")
  const context = canvas.getContext("2d")

  let map = null // {sides, values, row, plane, blocks, around}
  let turn = start()
  let zoom = 1
  let dragged = null
  let waiting = 0
  let settled = 0

  // Obliquely from above: rows are the picture's right, its down, and the line of sight, in the map's x, y, z.
  function start() { return times(about(0, -1.1), about(2, 0.6)) }

  function about(axis, angle) {
    const [c, s] = [Math.cos(angle), Math.sin(angle)]
    const [i, j] = [(axis + 1) % 3, (axis + 2) % 3]
    const made = [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
    made[axis][axis] = 1
    made[i][i] = made[j][j] = c
    made[i][j] = -s
    made[j][i] = s
    return made
  }

  function times(a, b) {
    return a.map(row => [0, 1, 2].map(k => row[0] * b[0][k] + row[1] * b[1][k] + row[2] * b[2][k]))
  }

  // --- The map

  function read() {
    const bytes = model.data
    map = null
    if (bytes && bytes.byteLength) {
      const voxels = bytes instanceof Uint8Array ? bytes : new Uint8Array(bytes)
      const sides = model.sides
      if (voxels.length === sides[0] * sides[1] * sides[2]) map = {sides, ...padded(voxels, sides), ...highest(voxels, sides)}
    }
    root.dataset.voxels = map ? model.data.byteLength : 0
    draw(FINE_PIXELS)
  }

  // With nothing around it, so that a place near its faces is like any other.
  function padded(voxels, [nx, ny, nz]) {
    const [row, plane] = [nx + 2 * MARGIN, (nx + 2 * MARGIN) * (ny + 2 * MARGIN)]
    const values = new Uint8Array(plane * (nz + 2 * MARGIN))
    for (let z = 0; z < nz; z++) for (let y = 0; y < ny; y++) {
      const from = (z * ny + y) * nx
      values.set(voxels.subarray(from, from + nx), (z + MARGIN) * plane + (y + MARGIN) * row + MARGIN)
    }
    return {values, row, plane}
  }

  // Of each block and those around it: where that is below the level, a step of a block's side misses nothing.
  function highest(voxels, [nx, ny, nz]) {
    const blocks = [nx, ny, nz].map(side => Math.ceil(side / BLOCK))
    const own = new Uint8Array(blocks[0] * blocks[1] * blocks[2])
    const at = (x, y, z) => (z * blocks[1] + y) * blocks[0] + x
    for (let z = 0, place = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, place++) {
      const block = at(x / BLOCK | 0, y / BLOCK | 0, z / BLOCK | 0)
      if (voxels[place] > own[block]) own[block] = voxels[place]
    }
    const around = new Uint8Array(own.length)
    for (let z = 0; z < blocks[2]; z++) for (let y = 0; y < blocks[1]; y++) for (let x = 0; x < blocks[0]; x++) {
      let most = 0
      for (let k = Math.max(0, z - 1); k <= Math.min(blocks[2] - 1, z + 1); k++)
        for (let j = Math.max(0, y - 1); j <= Math.min(blocks[1] - 1, y + 1); j++)
          for (let i = Math.max(0, x - 1); i <= Math.min(blocks[0] - 1, x + 1); i++) most = Math.max(most, own[at(i, j, k)])
      around[at(x, y, z)] = most
    }
    return {blocks, around}
  }

  // Between voxels.
  function sample(x, y, z) {
    const {values, row, plane} = map
    const i = Math.floor(x), j = Math.floor(y), k = Math.floor(z)
    const u = x - i, v = y - j, w = z - k
    const p = (k + MARGIN) * plane + (j + MARGIN) * row + i + MARGIN
    const q = p + plane
    const near = (values[p] * (1 - u) + values[p + 1] * u) * (1 - v) + (values[p + row] * (1 - u) + values[p + row + 1] * u) * v
    const far = (values[q] * (1 - u) + values[q + 1] * u) * (1 - v) + (values[q + row] * (1 - u) + values[q + row + 1] * u) * v
    return near * (1 - w) + far * w
  }

  // --- Drawing

  function draw(pixels) {
    const [width, height] = [root.clientWidth, root.clientHeight]
    note.textContent = model.note
    if (!width || !height) return
    const scale = Math.min(1, pixels / Math.max(width, height))
    const [wide, high] = [width, height].map(side => Math.max(1, Math.round(side * scale)))
    const ratio = window.devicePixelRatio || 1
    canvas.width = Math.round(width * ratio)
    canvas.height = Math.round(height * ratio)
    root.dataset.drawn = ""
    if (!map) return
    const picture = context.createImageData(wide, high)
    const level = model.level
    const {sides, blocks, around} = map
    const centre = sides.map(side => (side - 1) / 2)
    const radius = Math.hypot(...sides) / 2
    // All of the map's longest side fits, at whatever turn.
    const voxel = 1.15 * Math.max(...sides) / zoom / Math.min(wide, high)
    const [right, down, sight] = turn
    let hits = 0
    for (let row = 0, place = 0; row < high; row++) for (let column = 0; column < wide; column++, place += 4) {
      const a = (column - wide / 2 + 0.5) * voxel
      const b = (row - high / 2 + 0.5) * voxel
      const base = [0, 1, 2].map(n => centre[n] + a * right[n] + b * down[n])
      // Where the line enters and leaves the box, a voxel's margin about it.
      let [near, far] = [-radius - 2, radius + 2]
      for (let n = 0; n < 3; n++) {
        if (Math.abs(sight[n]) < 1e-9) {
          if (base[n] < -1 || base[n] > sides[n]) near = Infinity
          continue
        }
        const [one, other] = [(-1 - base[n]) / sight[n], (sides[n] - base[n]) / sight[n]]
        near = Math.max(near, Math.min(one, other))
        far = Math.min(far, Math.max(one, other))
      }
      let t = near
      let last = near
      while (t <= far) {
        const x = base[0] + t * sight[0], y = base[1] + t * sight[1], z = base[2] + t * sight[2]
        const i = Math.max(0, Math.min(blocks[0] - 1, Math.floor(x / BLOCK)))
        const j = Math.max(0, Math.min(blocks[1] - 1, Math.floor(y / BLOCK)))
        const k = Math.max(0, Math.min(blocks[2] - 1, Math.floor(z / BLOCK)))
        if (around[(k * blocks[1] + j) * blocks[0] + i] <= level) {
          last = t
          t += BLOCK - 1
          continue
        }
        if (sample(x, y, z) > level) break
        last = t
        t += STEP
      }
      if (t > far) continue
      let [outside, inside] = [last, t]
      for (let n = 0; n < 5; n++) {
        const middle = (outside + inside) / 2
        if (sample(base[0] + middle * sight[0], base[1] + middle * sight[1], base[2] + middle * sight[2]) > level) inside = middle
        else outside = middle
      }
      const [x, y, z] = [0, 1, 2].map(n => base[n] + inside * sight[n])
      const gradient = [
        sample(x + 1, y, z) - sample(x - 1, y, z),
        sample(x, y + 1, z) - sample(x, y - 1, z),
        sample(x, y, z + 1) - sample(x, y, z - 1),
      ]
      const length = Math.hypot(...gradient) || 1
      const along = axis => (gradient[0] * axis[0] + gradient[1] * axis[1] + gradient[2] * axis[2]) / length
      // Light from the upper left, behind the one who looks; what is further away is darker.
      const light = Math.max(0, 0.80 * along(sight) + 0.42 * along(down) + 0.42 * along(right))
      const depth = 1 - 0.35 * (inside + radius) / (2 * radius)
      const shade = (0.25 + 0.75 * light) * depth
      const gloss = 60 * Math.max(0, light) ** 24
      for (let n = 0; n < 3; n++) picture.data[place + n] = 255 * COLOUR[n] * shade + gloss
      picture.data[place + 3] = 255
      hits++
    }
    // Cast in fewer pixels than the screen has; the scale bar has all of them.
    const cast = new OffscreenCanvas(wide, high)
    cast.getContext("2d").putImageData(picture, 0, 0)
    context.setTransform(ratio, 0, 0, ratio, 0, 0)
    context.drawImage(cast, 0, 0, width, height)
    scaleBar(width, height, voxel * model.voxel_size * wide / width)
    root.dataset.drawn = hits
  }

  function scaleBar(width, height, angstromPerPixel) {
    const most = width / 4 * angstromPerPixel
    if (!(most > 0)) return
    const power = 10 ** Math.floor(Math.log10(most))
    const length = [5, 2, 1].map(step => step * power).find(step => step <= most)
    context.fillStyle = "#ffffff"
    context.font = "12px sans-serif"
    context.fillRect(12, height - 13, length / angstromPerPixel, 3)
    context.fillText(length >= 10 ? `${length / 10} nm` : `${length} Å`, 12, height - 18)
  }

  // Coarsely at once; finely when nothing has changed for a while.
  function change() {
    if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; draw(COARSE_PIXELS) })
    clearTimeout(settled)
    settled = setTimeout(() => draw(FINE_PIXELS), 120)
  }

  // --- Hands

  function rotate(dx, dy) {
    turn = times(times(about(0, dy), about(1, -dx)), turn)
    change()
  }

  function closer(factor) {
    zoom = Math.max(0.5, Math.min(8, zoom * factor))
    change()
  }

  canvas.addEventListener("pointerdown", event => {
    if (event.button !== 0) return
    canvas.focus()
    dragged = [event.clientX, event.clientY]
    canvas.setPointerCapture(event.pointerId)
  })
  canvas.addEventListener("pointermove", event => {
    if (!dragged) return
    rotate((event.clientX - dragged[0]) / 120, (event.clientY - dragged[1]) / 120)
    dragged = [event.clientX, event.clientY]
  })
  canvas.addEventListener("pointerup", () => { dragged = null })
  canvas.addEventListener("wheel", event => {
    event.preventDefault()
    closer(Math.exp(-event.deltaY / 400))
  }, {passive: false})
  const home = () => { turn = start(); zoom = 1; change() }
  canvas.addEventListener("dblclick", home)
  canvas.addEventListener("keydown", event => {
    if (event.metaKey || event.ctrlKey || event.altKey) return
    const keys = {
      ArrowLeft: () => rotate(-0.15, 0), ArrowRight: () => rotate(0.15, 0),
      ArrowUp: () => rotate(0, -0.15), ArrowDown: () => rotate(0, 0.15),
      "+": () => closer(1.2), "=": () => closer(1.2), "-": () => closer(1 / 1.2), 0: home,
    }
    if (!(event.key in keys)) return
    keys[event.key]()
    event.preventDefault()
  })

  // --- Following the server

  model.on(["data", "sides"], read)
  model.on(["level", "voxel_size"], change)
  model.on("note", () => { note.textContent = model.note })
  const observer = new ResizeObserver(change)
  observer.observe(root)
  model.on("remove", () => { observer.disconnect(); clearTimeout(settled); cancelAnimationFrame(waiting) })
  read()
  return root
}
