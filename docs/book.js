// Pages in frames learn the theme of the page around them, now and whenever it changes.
function tell(frame) {
  frame.contentWindow.postMessage({ theme: document.documentElement.dataset.theme }, "*");
}

const everyone = () => document.querySelectorAll("iframe.live").forEach(tell);

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("iframe.live").forEach(frame => frame.addEventListener("load", () => tell(frame)));
  new MutationObserver(everyone).observe(document.documentElement, { attributeFilter: ["data-theme"] });
});
window.addEventListener("load", everyone);
