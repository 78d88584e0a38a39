// SPDX-License-Identifier: Apache-2.0
require("net")
  .createServer({ allowHalfOpen: true }, (client) => client.pipe(client))
  .listen(Number(process.argv[2]), () => console.log("ready"));
