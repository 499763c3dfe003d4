// Conversations in the browser's IndexedDB: what is listed, and apart from it what they hold.

const NAME = "glmd";
const HEADS = "heads";
const RECORDS = "conversations";

/** The database; null where the browser keeps nothing, and conversations end with the page. */
const database = new Promise((resolve) => {
  let request;
  try {
    request = indexedDB.open(NAME, 1);
  } catch {
    return resolve(null);
  }
  request.onupgradeneeded = () => {
    request.result.createObjectStore(HEADS, { keyPath: "id" });
    request.result.createObjectStore(RECORDS, { keyPath: "id" });
  };
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => resolve(null);
});

const unkept = new Map();

/** Whether conversations outlive the page. */
export const keeps = async () => (await database) !== null;

/** What is listed: id, title and time of change of each conversation, latest first. */
export async function list() {
  const db = await database;
  const heads = db ? await result(db.transaction(HEADS).objectStore(HEADS).getAll()) : [...unkept.values()];
  return heads.sort((a, b) => b.updated - a.updated);
}

/** A conversation's record, or undefined. */
export async function load(id) {
  const db = await database;
  return db ? result(db.transaction(RECORDS).objectStore(RECORDS).get(id)) : unkept.get(id);
}

/** Resolves once the record is stored, whatever becomes of the page. */
export async function save(record) {
  const db = await database;
  if (!db) return void unkept.set(record.id, record);
  const { id, title, updated } = record;
  const change = db.transaction([HEADS, RECORDS], "readwrite");
  change.objectStore(HEADS).put({ id, title, updated });
  change.objectStore(RECORDS).put(record);
  await committed(change);
}

export async function remove(id) {
  const db = await database;
  if (!db) return void unkept.delete(id);
  const change = db.transaction([HEADS, RECORDS], "readwrite");
  change.objectStore(HEADS).delete(id);
  change.objectStore(RECORDS).delete(id);
  await committed(change);
}

/** Commit at once, so that a page that is being left does not hold the change back. */
function committed(change) {
  change.commit();
  return new Promise((resolve, reject) => {
    change.oncomplete = resolve;
    change.onabort = () => reject(change.error);
  });
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
