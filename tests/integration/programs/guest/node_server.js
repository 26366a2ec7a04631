// HTTP/1.1 by Node.js: state in the process, a stream, hashing on libuv's thread pool, a timer, a worker thread.
const http = require('http');
const crypto = require('crypto');
const { Worker, isMainThread, parentPort } = require('worker_threads');

if (!isMainThread) {
  parentPort.on('message', ({ id, body }) =>
    parentPort.postMessage({ id, digest: crypto.createHash('sha256').update(body).digest('hex') }));
} else {
  const state = { boot: crypto.randomBytes(8).toString('hex'), count: 0, kept: {}, ticks: 0 };
  setInterval(() => { state.ticks += 1; }, 50);
  const worker = new Worker(__filename);
  const waiting = new Map();
  let next = 0;
  worker.on('message', ({ id, digest }) => { waiting.get(id)(digest); waiting.delete(id); });
  const handle = async (request, response) => {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks);
    const [path, query] = request.url.split('?');
    if (path === '/stream') {
      for (let number = 0; number < Number(query) && !response.destroyed; number += 1) {
        response.write(`${number}\n`);
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      response.end();
      return;
    }
    let answer = '{}';
    if (path === '/state') answer = JSON.stringify(state);
    else if (path === '/count') { state.count += 1; answer = JSON.stringify({ count: state.count }); }
    else if (path === '/put') state.kept[query] = body.toString();
    else if (path === '/digest') {
      answer = await new Promise((resolve) => { next += 1; waiting.set(next, resolve); worker.postMessage({ id: next, body }); });
    }
    response.end(answer);
  };
  const server = http.createServer((request, response) => { handle(request, response).catch(() => response.destroy()); });
  server.keepAliveTimeout = 600000; // a client that is idle while a slow machine makes a checkpoint is not to be dropped
  server.listen(Number(process.argv[3]), process.argv[2]);
  process.on('SIGTERM', () => { server.closeAllConnections(); server.close(() => process.exit(0)); });
}
