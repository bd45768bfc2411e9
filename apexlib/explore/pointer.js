// Tell the kernel what a pointer does over a picture, by the value of the view's hidden text: the number of the picture
// (-1: the words), "hover", "click" or "drag", two corners as shares of width and height, the time. Over words: a token.
const say = (...words) => {
  const input = this.closest('.apex-view').querySelector('.apex-pointer input');
  input.value = [...words, Date.now()].join(' ');  // with the time, no two are alike
  input.dispatchEvent(new Event('change', {bubbles: true}));
};
if (event.type == 'click') {
  const place = event.target.dataset.token;
  if (place) say(-1, 'click', place, 0, place, 0);
} else {
  const box = this.getBoundingClientRect(), area = this.lastElementChild.style, from = this.from;
  const at = [(event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height];
  const sizes = from ? [0, 1].map(i => Math.abs(at[i] - from[i])) : [0, 0];
  const far = Math.hypot(sizes[0] * box.width, sizes[1] * box.height) > 5;
  if (event.type == 'pointerdown') {
    this.from = at;
    this.setPointerCapture(event.pointerId);
    event.preventDefault();
  } else if (event.type == 'pointerup' && from) {
    this.from = null;
    area.display = 'none';
    say(PICTURE, far ? 'drag' : 'click', ...from, ...at);
  } else if (from) {
    area.cssText = 'position: absolute; pointer-events: none; outline: 1px solid black; background: #8886';
    ['left', 'top'].forEach((side, i) => area[side] = 100 * Math.min(at[i], from[i]) + '%');
    ['width', 'height'].forEach((side, i) => area[side] = 100 * sizes[i] + '%');
  } else if (Date.now() - (this.told || 0) > 100) {
    this.told = Date.now();
    say(PICTURE, 'hover', ...at, ...at);
  }
}
