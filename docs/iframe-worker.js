// Browsers start no worker from a file. There, a hidden frame runs the worker of the site's search.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      this.started = new Promise((resolve) => {
        frame.addEventListener("load", () => resolve(this.start(frame, url)), { once: true });
      });
      document.body.append(frame);
    }

    // Return a promise of the frame's window, with the worker's script in it.
    start(frame, url) {
      const inside = frame.contentWindow;
      const send = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.postMessage = send;
      const script = inside.document.createElement("script");
      script.src = url;
      const loaded = new Promise((resolve) => script.addEventListener("load", () => resolve(inside)));
      inside.document.head.append(script);
      return loaded;
    }

    async postMessage(data) {
      const inside = await this.started;
      inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
  window.Worker = window.IFrameWorker;
}
