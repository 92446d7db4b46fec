// SPDX-License-Identifier: Apache-2.0

// Sends the bytes of its standard input to a URL with POST, twice, each time on a connection of its own and the
// second time with the session of the first. Prints what it got for it, as JSON.
const https = require('https');
const fs = require('fs');
const { createHash } = require('crypto');
const { once } = require('events');

const [url, address, ca, version] = process.argv.slice(2);
const body = fs.readFileSync(0);
const agent = new https.Agent({ maxCachedSessions: 4, ca: fs.readFileSync(ca), minVersion: version, maxVersion: version });

async function post() {
  const request = https.request(url, {
    method: 'POST', agent,
    lookup: (host, options, done) => options.all ? done(null, [{ address, family: 4 }]) : done(null, address, 4),
  });
  request.end(body);
  const [response] = await once(request, 'response');
  const reused = request.socket.isSessionReused(), protocol = request.socket.getProtocol();
  const hash = createHash('sha256');
  for await (const piece of response) hash.update(piece);
  return { status: response.statusCode, sha256: hash.digest('hex'), protocol, reused };
}

(async () => console.log(JSON.stringify([await post(), await post()])))();
