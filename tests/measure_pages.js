// Measures the pages in the frames of this page, and writes what it found into it.
const measure = (frame) => {
  const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
  const box = (x) => x.getBoundingClientRect();
  const all = (what) => [...page.querySelectorAll(what)];
  const scrolls = (x) => {
    const around = x.closest('.scroll');
    return around && getComputedStyle(around).overflowX == 'auto' && around != x;
  };
  const wide = all('body *').filter(
    (x) => x.checkVisibility() && box(x).width && box(x).right > width + 1 &&
      !scrolls(x) && !x.closest('svg'));
  const images = all('img');
  const views = all('details.view'), view = views[0];
  const before = box(view);
  view.open = true;
  if (views[1]) views[1].open = true;
  const shown = box(views[1] || view), closed = view.open;
  const large = box((views[1] || view).querySelector('svg'));
  (views[1] || view).open = false;
  return {
    width, pageWidth: page.documentElement.scrollWidth,
    wide: wide.slice(0, 5).map((x) => x.outerHTML.slice(0, 150)),
    broken: images.filter((x) => !x.naturalWidth).length, images: images.length,
    stored: all('image').length,
    blank: all('section img, .px').filter(
      (x) => !x.closest('.chosen') && box(x).width < 4).length,
    unresolved: all('use').filter(
      (x) => !page.querySelector(x.getAttribute('href'))).length,
    small: [before.width, before.height], open: [shown.width, shown.height],
    large: large.width, bothOpen: closed,
    focusable: all('details.view > summary').every((x) => x.tabIndex == 0),
    runs: all('.chosen > [class^=run]').filter((x) => box(x).height > 0).length,
    maps: all('.maps > *').filter((x) => box(x).height > 0).length,
    mapsCut: all('.maps .scroll').filter((x) => x.scrollWidth > x.clientWidth + 1).length,
    last: page.querySelector('section:last-of-type h2').id,
  };
};
addEventListener('load', () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe'))
    found[frame.title] = measure(frame);
  const result = document.createElement('pre');
  result.id = 'result'; result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
});
