// Reads a repository with the Hub's official JavaScript client: prints {path: [size, sha256]}, from what it downloads.
import { createHash } from "node:crypto";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, hubUrl, name, revision, accessToken] = process.argv.slice(2);
const require = createRequire(`${folder}/package.json`);
const { downloadFile, listFiles, modelInfo } = await import(pathToFileURL(require.resolve("@huggingface/hub")));

const repo = { type: "model", name };
const common = { repo, revision, hubUrl, accessToken };
const found = {};
for await (const file of listFiles({ ...common, recursive: true })) {
  if (file.type !== "file") continue;
  const blob = await downloadFile({ ...common, path: file.path });
  const bytes = Buffer.from(await blob.arrayBuffer());
  found[file.path] = [file.size, createHash("sha256").update(bytes).digest("hex")];
}
const info = await modelInfo({ name, hubUrl, accessToken, revision });
console.log(JSON.stringify({ files: found, name: info.name, private: info.private }));
